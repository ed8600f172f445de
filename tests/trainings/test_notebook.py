"""The notebook-like script, from top to bottom in a process of its own, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

SCRIPT = Path(__file__).with_name("notebook.py")


@pytest.mark.timeout(240)
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "plot.png").is_file()
    assert "Traceback" not in done.stderr
