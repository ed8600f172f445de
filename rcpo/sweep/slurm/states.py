"""What became of a cell that SLURM ran: its state from run.json, its job, and the log of its batch script.

A cell that is killed cannot say so in run.json; the script that outlives it writes "== ... ends: WHY" to
SWEEP/logs/NAME.log, and the last words before that are the reason. Called by `rcpo.sweep.slurm.submit`.
"""

import dataclasses
import re
from pathlib import Path

from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.slurm.queue import Job
from rcpo.sweep.states import CellStatus, State

TAIL_BYTES = 1 << 17
"""How much of a log's end is read."""
LONGEST_REASON = 300
EVENT = re.compile(r"== \S+ \S+ \S+ (starts|ends): (.*)")
OUT_OF_MEMORY = re.compile(r"oom[-_ ]?kill|out of memory|OutOfMemory", re.IGNORECASE)
PYTHON_ERROR = re.compile(r"(?:\[rank\d+\]: )?(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception)(?::|$)")
CONSEQUENCE = re.compile(r"reset by peer|closed by peer|Broken pipe|remote process", re.IGNORECASE)
"""What a rank fails of when another one is gone."""
KILLED = re.compile(r"srun: error: \S+: tasks? [\d,-]+: (?!Terminated|Exited)")
NOISE = re.compile(r"== |srun: |slurmstepd|Terminated$|\s*$")
FAILED = "failed"
"""How the script's word begins when the cell ended by itself."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """The last start of a cell, as its log has it."""

    lines: list[str]
    ending: str | None
    """What the script said at its end; None when it was ended before it could."""

    def first_error(self) -> str | None:
        """The line that says what went wrong first: the other ranks fail of that."""
        errors = [line for line in self.lines if PYTHON_ERROR.match(line)]
        for lines in (
            [line for line in self.lines if OUT_OF_MEMORY.search(line)],
            [line for line in errors if not CONSEQUENCE.search(line)],
            [line for line in self.lines if KILLED.match(line)],
            errors,
        ):
            if lines:
                return _shortened(lines[0])
        return None

    def last_words(self) -> str | None:
        """The first error, or else the last line that is not SLURM's, or else the last line."""
        spoken = [line for line in self.lines if line.strip()]
        own = [line for line in spoken if not NOISE.match(line)]
        return self.first_error() or next((_shortened(lines[-1]) for lines in (own, spoken) if lines), None)


def _shortened(line: str) -> str:
    return line.strip()[:LONGEST_REASON]


def log_of(sweep: SweepFolder, name: str) -> Path:
    """What the batch scripts of a cell said, all starts one after another."""
    return sweep.logs / f"{name}.log"


def last_attempt(log: Path) -> Attempt:
    """The last start in a cell's log."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    attempt = Attempt([], None)
    for line in lines:
        event = EVENT.fullmatch(line)
        if event is None:
            attempt.lines.append(line)
        elif event[1] == "starts":
            attempt = Attempt([], None)
        else:
            attempt = Attempt(attempt.lines, event[2])
    return attempt


def with_job(sweep: SweepFolder, status: CellStatus, job: Job | None) -> CellStatus:
    """The status of a cell, which `rcpo.sweep.states` read from its files, with what its newest job says."""
    if status.state is State.DONE:
        return status
    if job is not None and job.is_live:
        return _of_live(status, job)
    run = sweep.run(status.cell)
    log = log_of(sweep, status.cell.name)
    if not log.is_file() or (run.run_json.is_file() and log.stat().st_mtime < run.run_json.stat().st_mtime):
        return _with_reason(status, None if job is None else job.state)  # another tool had the last word
    attempt = last_attempt(log)
    if status.state is State.FAILED:
        first = attempt.first_error() if run.read_run().get("world_size", 1) > 1 else None
        return _with_reason(status, first or status.reason)
    if (attempt.ending or "").startswith(FAILED) or (job is not None and job.state == "OUT_OF_MEMORY"):
        return dataclasses.replace(
            status, state=State.FAILED, reason=attempt.last_words() or attempt.ending, node=None
        )
    return _with_reason(status, _why_stopped(attempt, job))


def _of_live(status: CellStatus, job: Job) -> CellStatus:
    """A cell that SLURM runs, or will run."""
    if not job.waits:
        return status
    state = State.PREEMPTED if status.state in (State.PREEMPTED, State.LOST) else State.PENDING
    why = "" if job.why in ("", "None") else f" ({job.why})"
    return dataclasses.replace(status, state=state, reason=f"queued as {job.id}{why}", node=None)


def _why_stopped(attempt: Attempt, job: Job | None) -> str | None:
    """In a few words: what SLURM says of the job, and what its script said."""
    parts = []
    if job is not None and job.state not in ("COMPLETED", "FAILED"):
        parts.append(job.state.lower().replace("_", " "))
    if attempt.ending is not None:
        parts.append(attempt.ending)
    return ": ".join(parts) or "ended without a word"


def _with_reason(status: CellStatus, reason: str | None) -> CellStatus:
    return dataclasses.replace(status, reason=reason or status.reason)
