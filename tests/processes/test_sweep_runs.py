"""Sweeps that really run, as users type them: one failing cell among others, one reference pass, stopping and
going on, and what is checked before anything starts.

Every cell is a process of its own that takes seconds to import, so few sweeps serve many tests.
"""

import contextlib
import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import ROOT, forked
from rcpo import cli
from rcpo.commands.sync import find_offline, is_synced
from rcpo.common.locks import read_holder, run_lock
from rcpo.runs.folder import RunFolder
from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.status import read_statuses

SMALL = "tracking=none, data.train_pairs=64, data.eval_pairs=8, train.pairs_per_step=4, train.eval_every=0"
GRID = f"""
overrides: [{SMALL}, train.steps=3]
axes:
  objective: [dpo, simpo, ipo, {{label: hopeless, overrides: [objective=dpo, optim.lr=1e30]}}]
"""
LONG = ["train", "-m", "objective=dpo,simpo,ipo", *SMALL.split(", "), "train.steps=1000000", "name=long"]
"""An inline sweep."""


def environment(folder: Path) -> dict[str, str]:
    own = {"RCPO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | own


def rcpo(folder: Path, *words: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command that must end with `code`."""
    done = forked.rcpo(*words, cwd=folder, env=environment(folder), seconds=240)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, done.stderr


def states(folder: Path, sweep: str) -> dict[str, str]:
    return {status.cell.name: str(status.state) for status in read_statuses(SweepFolder(folder / sweep))}


def said_here(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: object, code: int = 0) -> str:
    """stdout and stderr of a command that starts nothing, in this process: importing takes seconds."""
    monkeypatch.chdir(folder)
    output = io.StringIO()
    redirected = contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)
    with redirected[0], redirected[1], pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    assert stopped.value.code == code, output.getvalue()
    return output.getvalue()


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepFolder, str]:
    """A sweep of four cells that were started together, one of which cannot train; and what it said."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "grid.yaml").write_text(GRID)
    said, _ = rcpo(folder, "sweep", "grid.yaml", "--parallel", 4, code=1)
    return folder, SweepFolder(folder / "sweeps-out/grid"), said


def test_one_failed_cell_stops_no_other_and_is_named_at_the_end(
    swept: tuple[Path, SweepFolder, str],
) -> None:
    folder, sweep, said = swept
    assert states(folder, "sweeps-out/grid") == {
        "dpo": "done", "simpo": "done", "ipo": "done", "hopeless": "failed",
    }  # fmt: skip
    assert "4 cells: 3 done, 1 failed" in said
    (line,) = [line for line in said.splitlines() if line.startswith("hopeless: failed: ")]
    assert "step" in line
    assert str(sweep.cells / "hopeless/logs/console.log") in line
    assert (sweep.cells / "dpo/final/model.safetensors").is_file()


def test_cells_that_start_together_compute_their_references_once(
    swept: tuple[Path, SweepFolder, str],
) -> None:
    """What each says in its log: one computes all sides that it needs, the others none of them."""
    _, sweep, _ = swept
    logs = [(sweep.run(cell).logs / "rank-0000.log").read_text() for cell in sweep.read_cells()]
    computed = sorted(
        int(line.split(" sides computed")[0].split()[-1])
        for log in logs
        for line in log.splitlines()
        if "sides computed" in line
    )
    # 3 steps of 4 pairs and 8 held-out ones, two sides each; data order and so pairs are the seed's alone.
    assert computed == [0, 0, 0, 40]


def test_the_same_sweep_again_runs_only_what_has_failed(swept: tuple[Path, SweepFolder, str]) -> None:
    folder, sweep, _ = swept
    before = (sweep.cells / "dpo/run.json").read_bytes()
    said, _ = rcpo(folder, "sweep", "grid.yaml", code=1)
    assert [line for line in said.splitlines() if "started" in line] == ["1/1 hopeless: started"]
    assert said.splitlines()[-1] == f"`rcpo compare {sweep.path}` puts the runs side by side"
    assert (sweep.cells / "dpo/run.json").read_bytes() == before
    assert RunFolder(sweep.cells / "hopeless").read_run()["num_resumed"] == 1


def test_a_dry_run_costs_a_sweep_at_the_speed_of_its_finished_cells(
    swept: tuple[Path, SweepFolder, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sweep, _ = swept
    before = sorted(folder.rglob("*"))
    said = said_here(folder, monkeypatch, "sweep", "grid.yaml", "--dry-run")
    assert "4 cells, 12 steps, 48 pairs, " in said
    assert f"as measured on the finished cells of {sweep.path}" in said
    given = said_here(folder, monkeypatch, "sweep", "grid.yaml", "--dry-run", "--pairs-per-second", 0.01)
    # 48 / 0.01 and a start of 15 s a cell; one reference pass of 12 + 8 pairs at three times the speed.
    assert "4 cells, 12 steps, 48 pairs, 1.54 hours of one process" in given
    assert "15 s of start-up for each cell (estimate.start_seconds), and one reference pass" in given
    assert sorted(folder.rglob("*")) == before


def test_a_script_that_is_shown_leaves_nothing_and_composes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ninety cells, from any folder; afterwards the sweep runs here as if nothing had been asked."""
    monkeypatch.setattr("rcpo.sweep.freeze.compose", lambda words: pytest.fail("composed"))
    said = said_here(tmp_path, monkeypatch, "sweep", "demo", "--slurm", "example", "--print")
    assert said.startswith("#!/usr/bin/env bash")
    assert "#SBATCH --array=0-89%16\n" in said
    assert f"{tmp_path}/sweeps-out/demo" in said
    assert list(tmp_path.iterdir()) == []


def wait_until(is_so: Callable[[], bool], what: str, process: forked.Child) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert process.poll() is None, f"ended with {process.code} before {what}\n{process.said()}"
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def started(folder: Path, *words: object) -> forked.Child:
    log = folder / "runner.log"
    return forked.start_rcpo(*words, cwd=folder, env=environment(folder), output=log, errors=log)


def num_rows(run: RunFolder) -> int:
    return run.metrics.read_bytes().count(b"\n") if run.metrics.is_file() else 0


@pytest.mark.ci("sweeps that are stopped")
def test_a_sweep_is_cancelled_goes_on_and_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three endless cells, two at a time, from the words of `rcpo train -m`.

    `rcpo cancel`: both stop with checkpoints. `rcpo resume`: they go on, row after row, and nobody else may
    run the sweep meanwhile. Ctrl-C while one cell hangs: the other stops with a checkpoint; the second Ctrl-C
    ends the one that hangs.
    """
    first, second, third = (
        RunFolder(tmp_path / f"sweeps-out/long/cells/{name}") for name in ("dpo", "simpo", "ipo")
    )
    runner = started(tmp_path, *LONG, "--parallel", 2)
    try:
        wait_until(lambda: num_rows(first) > 2 and num_rows(second) > 2, "both train", runner)
        assert states(tmp_path, "sweeps-out/long") == {"dpo": "running", "simpo": "running", "ipo": "pending"}
        assert said_here(tmp_path, monkeypatch, "cancel", "sweeps-out/long") == "stopped\n"
        assert runner.wait(20) == 75
        assert states(tmp_path, "sweeps-out/long") == {
            "dpo": "preempted", "simpo": "preempted", "ipo": "pending",
        }  # fmt: skip
        stopped_at = num_rows(first), num_rows(second)
        assert [len(list(run.checkpoints.iterdir())) for run in (first, second, third)] == [1, 1, 0]

        runner = started(tmp_path, "resume", "sweeps-out/long", "--parallel", 2)
        wait_until(
            lambda: num_rows(first) > stopped_at[0] + 2 and num_rows(second) > stopped_at[1] + 2,
            "both go on", runner,
        )  # fmt: skip
        refused = said_here(tmp_path, monkeypatch, *LONG, code=2)
        assert f"is being run by process {runner.started()} on " in refused
        refused = said_here(tmp_path, monkeypatch, "resume", first.path, code=2)
        assert "is being trained by process " in refused
        hanging = int(read_holder(run_lock(first.path))["pid"])
        os.kill(hanging, signal.SIGSTOP)
        runner.send(signal.SIGINT)
        wait_until(lambda: second.read_run()["status"] == "preempted", "the second stops", runner)
        time.sleep(0.5)
        assert runner.poll() is None
        runner.send(signal.SIGINT)
        assert runner.wait(20) == 130
    finally:
        if runner.poll() is None:
            runner.send(signal.SIGINT)
            time.sleep(1)
            runner.send(signal.SIGINT)
            runner.wait(20)
    assert states(tmp_path, "sweeps-out/long") == {
        "dpo": "interrupted", "simpo": "preempted", "ipo": "pending",
    }  # fmt: skip
    for run in (first, second):
        steps = [row["step"] for row in run.rows(run.metrics)]
        assert steps == list(range(1, len(steps) + 1))
    assert "3 cells: 2 preempted, 1 pending" in (tmp_path / "runner.log").read_text()
    said = said_here(tmp_path, monkeypatch, "cancel", "sweeps-out/long")
    assert said == "nothing runs this sweep\n"


FILE = "{label: mine, overrides: [data=file, data.path=no.jsonl]}"
MISTAKES = {
    "axes: {objective: [dpo, dpoo]}": "cell dpoo: objective=dpoo: no such option; did you mean",
    f"overrides: [{SMALL}]\naxes: {{data: [arithmetic, {FILE}]}}": "cell mine: data.path=",
    f"overrides: [{SMALL}]\naxes: {{train.max_length: [2, 64], data.train_pairs: [2]}}": "grid.yaml: "
    "data.train_pairs=64: data.train_pairs is an axis of this sweep; remove one",
    "overrides: [data.train_pairs=64]\naxes: {train.pairs_per_step: [4, 4096]}": "cell pairs_per_step4096: "
    "train.pairs_per_step=4096: there are only 64 training pairs",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_what_is_wrong_with_any_cell_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """One line, exit code 2, nothing written."""
    (tmp_path / "grid.yaml").write_text(text)
    said = said_here(tmp_path, monkeypatch, "sweep", "grid.yaml", code=2)
    assert said.startswith(f"rcpo: {MISTAKES[text]}")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


FLAGS = {
    "--parallel 0": "at least 1",
    "--print": "type --slurm PROFILE",
    "--quick": "--quick",
    "a": "must be",
}


@pytest.mark.parametrize("words", FLAGS)
def test_a_wrong_flag_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    said = said_here(tmp_path, monkeypatch, "sweep", "grid.yaml", *words.split(), code=2)
    assert FLAGS[words] in said
    assert said.count("\n") == 1


def test_a_dry_run_of_hub_data_fetches_nothing_and_says_so(tmp_path: Path) -> None:
    """No network is asked: an address that answers nobody would take its clients half a minute."""
    sweep_file = ROOT / "sweeps/paper_qwen.yaml"
    begun = time.monotonic()
    said, _ = rcpo(tmp_path, "sweep", sweep_file, "--dry-run", "--pairs-per-second", 20)
    assert "not checked: hub data and models that are not on this machine: Qwen/Qwen2.5-7B-Instruct, " in said
    assert "15 cells, 28,665 steps, 917,280 pairs, 13.1 " in said
    # 15 x 1911 x 32; / 20 / 3600 is 12.7, the starts 0.06, a reference pass of 61135 pairs 0.28
    assert "Retrying" not in said
    assert time.monotonic() - begun < 100
    assert list(tmp_path.iterdir()) == []


def test_sync_finds_what_is_offline_and_wants_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (tmp_path / f"cells/a/wandb/offline-run-2026010{day}_000000-abc" for day in (1, 2))
    for path in (new, old):
        path.mkdir(parents=True)
    (old / "run-abc.wandb.synced").write_text("")
    assert find_offline(tmp_path) == [old, new]
    assert find_offline(tmp_path / "cells/a") == [old, new]
    assert (is_synced(old), is_synced(new)) == (True, False)
    home = environment(tmp_path) | {"HOME": str(tmp_path)}
    home.pop("NETRC", None)
    done = forked.rcpo("sync", tmp_path, cwd=tmp_path, env=home)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("rcpo: W&B: no API key is configured")
    assert "has no offline W&B files" in said_here(tmp_path, monkeypatch, "sync", "cells", code=2)
