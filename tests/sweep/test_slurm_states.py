"""What `rcpo status` makes of a cell under SLURM: of its files, its log and its job, made by hand."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from rcpo.runs.folder import RunFolder
from rcpo.sweep.folder import Cell, SweepFolder
from rcpo.sweep.slurm.queue import Job, jobs_of
from rcpo.sweep.slurm.states import last_attempt, log_of, with_job
from rcpo.sweep.states import CellStatus, State, read_status

CELL = Cell("one", {}, [], "")
START = "== 2026-01-01 10:00:00 7_0 starts: n1, restart 0"
TRACEBACK = ["Traceback (most recent call last):", '  File "x.py", line 3']
LOST_PEER = "[rank0]: RuntimeError: pair.cc:537] Read error: Connection reset by peer."


def ends(text: str) -> str:
    return f"== 2026-01-01 10:05:00 7_0 ends: {text}"


def job(state: str, why: str = "None") -> Job:
    return Job("7", 0, state, "n1" if state == "RUNNING" else None, why, 0)


def status_of(
    folder: Path, run_json: dict[str, Any], lines: list[str], newest: Job | None = None
) -> CellStatus:
    """As `rcpo.sweep.slurm.submit` reads it."""
    sweep = SweepFolder(folder)
    run = sweep.run(CELL)
    run.path.mkdir(parents=True)
    RunFolder(run.path).update_run(**run_json)
    sweep.logs.mkdir()
    if lines:
        log_of(sweep, CELL.name).write_text("\n".join([START, *lines]) + "\n")
    queue = {CELL.name: newest.entry()} if newest is not None and newest.is_live else {}
    return with_job(sweep, read_status(sweep, CELL, queue), newest)


CASES: dict[str, tuple[dict[str, Any], list[str], Job | None, State, str | None]] = {
    "never submitted": ({"status": "pending"}, [], None, State.PENDING, None),
    "queued": (
        {"status": "pending"}, [], job("PENDING", "Resources"), State.PENDING, "queued as 7_0 (Resources)",
    ),
    "runs": ({"status": "running"}, ["step 1"], job("RUNNING"), State.RUNNING, None),
    "loads": ({"status": "pending"}, [], job("RUNNING"), State.RUNNING, None),
    "waits for its next start": (
        {"status": "preempted", "exit_reason": "SIGTERM"}, [ends("requeued")], job("PENDING", "BeginTime"),
        State.PREEMPTED, "queued as 7_0 (BeginTime)",
    ),
    "node gone, waits": ({"status": "running"}, [], job("PENDING"), State.PREEMPTED, "queued as 7_0"),
    "failed, submitted again": (
        {"status": "failed", "exit_reason": "x"}, [], job("PENDING"), State.PENDING, "queued as 7_0",
    ),
    "done": ({"status": "done"}, [ends("done")], None, State.DONE, None),
    "failed": (
        {"status": "failed", "exit_reason": "ValueError: no"}, [ends("failed")], job("FAILED"), State.FAILED,
        "ValueError: no",
    ),
    "another rank failed first": (
        {"status": "failed", "exit_reason": "RuntimeError: reset by peer", "world_size": 2},
        [LOST_PEER, *TRACEBACK, "[rank1]: IndexError: 7", ends("failed")], None, State.FAILED,
        "[rank1]: IndexError: 7",
    ),
    "another rank was killed": (
        {"status": "failed", "exit_reason": "RuntimeError: reset by peer", "world_size": 2},
        [LOST_PEER, "srun: error: n0: task 1: Killed", "srun: error: n0: task 0: Terminated", ends("failed")],
        None, State.FAILED, "srun: error: n0: task 1: Killed",
    ),
    "out of memory": (
        {"status": "running"},
        ["step 3", "slurmstepd-n1: error: Detected 1 oom_kill event in StepId=7.0.",
         "srun: error: n1: task 0: Out Of Memory", ends("failed without a word")],
        None, State.FAILED, "slurmstepd-n1: error: Detected 1 oom_kill event in StepId=7.0.",
    ),
    "out of memory, script too": (
        {"status": "running"}, ["step 3"], job("OUT_OF_MEMORY"), State.FAILED, "step 3",
    ),
    "Python error, unwritten": (
        {"status": "running"}, [*TRACEBACK, "OSError: disk", ends("failed without a word")], None,
        State.FAILED, "OSError: disk",
    ),
    "setup": (
        {"status": "pending"}, ["module: nothing named cuda", ends("failed in setup")], None, State.FAILED,
        "module: nothing named cuda",
    ),
    "killed with its script": (
        {"status": "running"}, ["step 3"], job("FAILED"), State.LOST, "ended without a word",
    ),
    "forgotten": ({"status": "running"}, ["step 3"], None, State.LOST, "ended without a word"),
    "cancelled": (
        {"status": "preempted", "exit_reason": "SIGTERM"}, [ends("stopped by SLURM")], job("CANCELLED"),
        State.PREEMPTED, "cancelled: stopped by SLURM",
    ),
    "node gone, not requeued": (
        {"status": "running"}, ["step 3"], job("NODE_FAIL"), State.LOST, "node fail",
    ),
    "too many starts": (
        {"status": "preempted", "exit_reason": "SIGUSR2"}, [ends("not requeued: requeue_limit is 2")],
        job("FAILED"), State.PREEMPTED, "not requeued: requeue_limit is 2",
    ),
}  # fmt: skip
"""run.json, the log of the last start, the newest job; the state and reason that they come to."""


@pytest.mark.parametrize("case", CASES)
def test_files_log_and_job_make_a_state(tmp_path: Path, case: str) -> None:
    run_json, lines, newest, state, reason = CASES[case]
    status = status_of(tmp_path, run_json, lines, newest)
    assert (status.state, status.reason) == (state, reason)
    assert status.queued == (newest is not None and newest.is_live)


def test_only_the_last_start_counts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join([START, "MemoryError: old", ends("failed"), START, "step 1", "step 2"]))
    attempt = last_attempt(log)
    assert (attempt.lines, attempt.ending) == (["step 1", "step 2"], None)


def test_a_run_that_went_on_elsewhere_is_not_judged_by_an_old_log(tmp_path: Path) -> None:
    """Resumed by hand after SLURM gave it up: run.json is newer than the log."""
    sweep = SweepFolder(tmp_path)
    assert status_of(tmp_path, {"status": "running"}, [ends("failed without a word")]).state is State.FAILED
    old = time.time() - 60
    os.utime(log_of(sweep, CELL.name), (old, old))
    sweep.run(CELL).update_run(status="interrupted", exit_reason="SIGINT")
    status = with_job(sweep, read_status(sweep, CELL, {}), None)
    assert (status.state, status.reason) == (State.INTERRUPTED, "SIGINT")


SQUEUE = """#!/bin/sh
cat <<'END'
5|0|FAILED|n0|NonZeroExitCode|rcpo:me:0
5|1|COMPLETED|n0|None|rcpo:me:0
9|0|RUNNING|n1|None|rcpo:me:0
10|0|CANCELLED||None|rcpo:me:0
11|0|PENDING||Dependency|rcpo:me:3
11|1|RUNNING|n1|None|rcpo:other:0
12|2|RUNNING|n[0-1]|None|rewritten | by the site
13|0|RUNNING|n0|None|(null)
END
"""


def test_jobs_are_known_by_their_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A squeue that answers from a file: the live job of a cell wins over newer ended ones, other sweeps' and
    strangers' jobs are not there; a submission is remembered where the comment is another."""
    program = tmp_path / "squeue"
    program.write_text(SQUEUE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    jobs = jobs_of("me", {"12": 6, "11": 0})
    assert {cell: found.id for cell, found in jobs.items()} == {0: "9_0", 1: "5_1", 3: "11_0", 8: "12_2"}
    assert [jobs[cell].is_live for cell in (0, 1, 3, 8)] == [True, False, True, True]
    assert (jobs[3].waits, jobs[8].node) == (True, "n[0-1]")
