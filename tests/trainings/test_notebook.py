"""The notebook-like script, from top to bottom in a process of its own, as a user runs it."""

from pathlib import Path

import pytest

from helpers import forked

SCRIPT = Path(__file__).with_name("notebook.py")


@pytest.mark.ci("real processes")
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    done = forked.script(SCRIPT.read_text(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "plot.png").is_file()
