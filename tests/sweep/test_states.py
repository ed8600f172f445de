"""States of cells, read from files, locks and a scheduler's queue; and the locks themselves, held by real
processes."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from rcpo import cli
from rcpo.common.locks import HeldError, end_holder, hold, is_held, read_holder, run_lock
from rcpo.runs.folder import RunFolder
from rcpo.sweep.folder import Cell, SweepFolder
from rcpo.sweep.states import CellStatus, QueueEntry, State, read_status
from rcpo.sweep.status import read_statuses
from rcpo.sweep.table import counts_line, status_json, status_table

HOLD = """
import sys, time
from pathlib import Path
from rcpo.common.locks import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def made_cell(sweep: SweepFolder, name: str = "a", epochs: float | None = None, **run_json: Any) -> Cell:
    """A cell of ten steps, or of so many epochs, whose run.json says this."""
    cell = Cell(name, {"objective": name}, [f"objective={name}"], "digest")
    run = sweep.run(cell)
    run.path.mkdir(parents=True)
    steps = 10 if epochs is None else None
    run.config.write_text(yaml.safe_dump({"train": {"steps": steps, "epochs": epochs}}))
    run.run_json.write_text(json.dumps(run_json))
    with sweep.manifest.open("a") as stream:
        stream.write(cell.line())
    return cell


def add_rows(run: RunFolder, num_steps: int, seconds: float = 2.0) -> None:
    """Rows of metrics.jsonl with loss = step, 32 pairs of 100 a step; the last line is cut short."""
    rows = [
        {"step": step, "train/loss": float(step), "train/epoch": 0.32 * step, "speed/step_seconds": seconds}
        for step in range(1, num_steps + 1)
    ]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99')


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path)


@pytest.mark.parametrize("status", ["pending", "preempted", "interrupted", "failed", "done"])
def test_a_cell_that_nothing_runs_is_in_the_state_that_it_wrote_last(sweep: SweepFolder, status: str) -> None:
    cell = made_cell(sweep, status=status, exit_reason="because")
    read = read_status(sweep, cell, None)
    assert read.state == status
    assert read.reason == (None if status == "pending" else "because")


def test_a_cell_says_running_and_is_lost_when_its_process_is_gone(sweep: SweepFolder) -> None:
    """However that ended: the system gives its lock back."""
    cell = made_cell(sweep, status="running", host="here")
    lock = run_lock(sweep.run(cell).path)
    with holder(lock) as process:
        assert read_status(sweep, cell, None).state is State.RUNNING
        assert read_status(sweep, cell, None).node == "here"
        process.kill()
        process.wait()
        assert read_status(sweep, cell, None).state is State.LOST


@pytest.mark.parametrize("status", ["pending", "failed", "preempted"])
def test_a_cell_that_has_just_been_started_runs_whatever_it_wrote_before(
    sweep: SweepFolder, status: str
) -> None:
    cell = made_cell(sweep, status=status)
    with hold(run_lock(sweep.run(cell).path)):
        assert read_status(sweep, cell, None).state is State.RUNNING
    assert read_status(sweep, cell, None).state == status


def test_under_a_scheduler_its_queue_says_what_runs(sweep: SweepFolder) -> None:
    cell = made_cell(sweep, status="running")
    assert read_status(sweep, cell, {}).state is State.LOST
    status = read_status(sweep, cell, {"a": QueueEntry(running=True, node="n1", job="7_0")})
    assert (status.state, status.node, status.queued) == (State.RUNNING, "n1", True)
    waiting = made_cell(sweep, "b", status="preempted")
    status = read_status(sweep, waiting, {"b": QueueEntry(running=False)})
    assert (status.state, status.queued) == (State.PREEMPTED, True)


def test_progress_is_read_from_whole_rows(sweep: SweepFolder) -> None:
    """Steps 1..8 of 10 at 2 s: 4 s left; loss over the last eight, (1 + .. + 8) / 8 = 4.5."""
    cell = made_cell(sweep, status="running")
    run = sweep.run(cell)
    add_rows(run, 8)
    run.eval.write_text(
        '{"step": 0, "displacement/chosen": 0.0}\n{"step": 5, "displacement/chosen": -1.5}\n{"st'
    )
    with hold(run_lock(run.path)):
        status = read_status(sweep, cell, None)
    assert (status.step, status.num_steps, status.loss, status.chosen) == (8, 10, 4.5, -1.5)
    assert status.eta_seconds == pytest.approx(4.0)
    assert read_status(sweep, cell, None).eta_seconds is None  # it does not run


def test_the_number_of_steps_of_epochs_is_known_from_the_first_step_on(sweep: SweepFolder) -> None:
    """0.32 epochs a step: two epochs are 6.25, so 7 steps, as the sampler counts."""
    cell = made_cell(sweep, epochs=2.0, status="running")
    assert read_status(sweep, cell, None).num_steps is None
    add_rows(sweep.run(cell), 3)
    assert read_status(sweep, cell, None).num_steps == 7


def test_a_long_file_is_read_from_its_end(sweep: SweepFolder) -> None:
    cell = made_cell(sweep, status="running")
    add_rows(sweep.run(cell), 5000)
    status = read_status(sweep, cell, None)
    assert (status.step, status.loss) == (5000, 4995.5)


def test_a_damaged_run_json_is_a_failed_cell_with_a_reason(sweep: SweepFolder) -> None:
    cell = made_cell(sweep)
    sweep.run(cell).run_json.write_text('{"status": "do')
    status = read_status(sweep, cell, None)
    assert status.state is State.FAILED
    assert "run.json: is damaged" in str(status.reason)


def all_states(sweep: SweepFolder) -> list[CellStatus]:
    made_cell(sweep, "a", status="done")
    made_cell(sweep, "b", status="failed", exit_reason="out of memory")
    made_cell(sweep, "c", status="running")
    made_cell(sweep, "d", status="pending")
    add_rows(sweep.run(Cell("b", {}, [], "")), 4)
    return read_statuses(sweep)


def test_the_table_and_the_json_say_the_same(sweep: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    statuses = all_states(sweep)
    assert counts_line(statuses) == "4 cells: 1 done, 1 lost, 1 failed, 1 pending"
    answer = json.loads(status_json(sweep, statuses))
    assert [cell["state"] for cell in answer["cells"]] == ["done", "failed", "lost", "pending"]
    assert answer["counts"] == {"done": 1, "failed": 1, "lost": 1, "pending": 1}
    failed = answer["cells"][1]
    assert (failed["name"], failed["step"], failed["num_steps"]) == ("b", 4, 10)
    assert (failed["reason"], failed["axes"]) == ("out of memory", {"objective": "b"})
    console = Console(width=200, force_terminal=False)
    console.print(status_table(console, statuses))
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "failed" in line]
    assert [text.strip() for text in line.split("|")[1:-1]] == [
        "b", "failed", "4/10", "2.5", "-", "-", "out of memory",
    ]  # fmt: skip


@pytest.mark.parametrize(("flags", "wanted"), [([], "4 cells: 1 done"), (["--json"], '"name": "b"')])
def test_the_status_command_prints_both(
    sweep: SweepFolder, capsys: pytest.CaptureFixture[str], flags: list[str], wanted: str
) -> None:
    all_states(sweep)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["status", str(sweep.path), *flags])
    assert stopped.value.code == 0
    assert wanted in capsys.readouterr().out


def test_a_lock_is_one_process_s_and_says_whose(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    assert not is_held(lock)
    with hold(lock):
        assert is_held(lock)
        assert read_holder(lock) == {"pid": os.getpid(), "host": platform.node()}
        with pytest.raises(HeldError, match=f"process {os.getpid()} on"), hold(lock):
            pass
    assert not is_held(lock)


def test_looking_at_a_lock_does_not_keep_others_from_taking_it(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with holder(lock) as process:
        for _ in range(100):
            assert is_held(lock)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with hold(lock):
        assert read_holder(lock)["pid"] == os.getpid()


def test_those_that_look_do_not_see_each_other(tmp_path: Path) -> None:
    """One of them keeps its look open while the other looks: nobody holds the lock, and no file is made."""
    lock = tmp_path / ".lock"
    assert not is_held(lock)
    assert not lock.exists()
    lock.touch()
    with lock.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        assert not is_held(lock)


def test_a_contender_leaves_the_holder_s_words_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcpo.common.locks.SECONDS_FOR_READERS", 0.1)
    lock = tmp_path / ".lock"
    with holder(lock) as process:
        with pytest.raises(HeldError, match=f"process {process.pid} on"), hold(lock):
            pass
        assert read_holder(lock) == {"pid": process.pid, "host": platform.node()}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_in_the_file_system_nothing_is_held_and_nothing_left(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In particular no file whose existence is the lock: that would outlive a killed process."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = tmp_path / ".lock"
    for _ in range(2):
        with hold(lock), hold(lock):
            assert not is_held(lock)


def test_the_holder_is_ended_and_nobody_else(tmp_path: Path) -> None:
    """A process that the file names by mistake does not have the file open."""
    lock = tmp_path / ".lock"
    with holder(lock) as process, holder(tmp_path / "other") as other:
        lock.write_text(json.dumps({"pid": other.pid, "host": platform.node()}))
        with pytest.raises(HeldError):
            end_holder(lock, 5)
        lock.write_text(json.dumps({"pid": process.pid, "host": "another-host"}))
        with pytest.raises(HeldError, match="on another-host"):
            end_holder(lock, 5)
        assert process.poll() is None
        assert other.poll() is None
        lock.write_text(json.dumps({"pid": process.pid, "host": platform.node()}))
        started = time.monotonic()
        assert end_holder(lock, 20)
        assert time.monotonic() - started < 10
        assert process.wait() == -signal.SIGTERM


@pytest.mark.parametrize("command", ["status", "cancel"])
def test_a_folder_that_is_no_sweep_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, str(tmp_path)])
    assert stopped.value.code == 2
    assert (
        "is not a sweep folder, and no run; give the one that `rcpo sweep` or `rcpo train` printed"
        in capsys.readouterr().err
    )
