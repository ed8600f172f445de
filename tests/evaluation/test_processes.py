"""Several runs evaluated at the same time: one process a GPU, none stopped by the fault of another. A shell
script stands for Python."""

import sys
from pathlib import Path

import pytest
import torch

from rcpo.common.errors import UserError
from rcpo.evaluation import processes
from rcpo.runs.folder import RunFolder


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """Says what it was started with; fails for the run `bad`."""
    script = folder / "python"
    script.write_text(
        "#!/bin/sh\n"
        'echo "$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS $@" > "$4/seen"\n'
        "sleep 0.3\n"
        'case "$4" in *bad) echo "rcpo: no room" >&2; exit 2;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def runs_in(folder: Path, *names: str) -> list[RunFolder]:
    runs = [RunFolder(folder / name) for name in names]
    for run in runs:
        run.path.mkdir()
    return runs


def test_each_run_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four GPUs two may be used, 1 and 3; three runs, one of which fails."""
    stand_in(tmp_path, monkeypatch, gpus=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs, said = runs_in(tmp_path, "a", "bad", "c"), list[str]()
    assert processes.num_processes(3, None) == 2
    assert processes.num_processes(1, None) == 1
    failed = processes.evaluate_runs(runs, ["tasks=mine", "initial=no"], 2, said.append)
    assert failed == {tmp_path / "bad": "no room"}
    seen = [(run.path / "seen").read_text().split() for run in runs]
    assert {each[0] for each in seen[:2]} == {"1", "3"}
    assert seen[2][0] in ("1", "3")
    assert all(each[2:4] == ["-m", "rcpo.cli"] and each[-2:] == ["tasks=mine", "initial=no"] for each in seen)
    assert len(said) == 3
    assert "failed: no room" in "".join(said)


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, gpus=2)
    with pytest.raises(UserError, match=r"--parallel 3: 2 GPUs can be used here, .* type --parallel 2"):
        processes.num_processes(4, 3)


def test_without_gpus_one_run_is_evaluated_at_a_time_unless_more_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, gpus=0)
    assert (processes.num_processes(4, None), processes.num_processes(4, 3)) == (1, 3)
    assert processes.evaluate_runs(runs_in(tmp_path, "a", "b"), [], 2, lambda line: None) == {}
