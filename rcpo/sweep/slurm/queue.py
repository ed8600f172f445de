"""What SLURM knows: its commands, a sweep's jobs among all jobs, and an environment to submit from.

Asks squeue and scontrol, never sacct: many clusters have no accounting database. Called by
`rcpo.sweep.slurm.submit`.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rcpo.common.errors import UserError
from rcpo.ranks.environment import RANK_VARIABLES
from rcpo.sweep.slurm.script import COMMENT
from rcpo.sweep.states import QueueEntry

ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
     "REVOKED", "TIMEOUT")
)  # fmt: skip
"""States of a job that will do nothing more."""
WAITS = frozenset(
    ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
)
SECONDS = 60
"""How long a command may take."""
FIELDS = "%F|%K|%T|%N|%r|%k"
DEFAULT_MAX_ARRAY_SIZE = 1001
"""SLURM's own."""


@dataclass(frozen=True)
class Job:
    """One task of an array."""

    array: str
    """Job id of the array."""
    index: int
    state: str
    node: str | None
    why: str
    """Why it waits, as squeue says it."""
    cell: int
    """Index of its cell in the manifest."""

    @property
    def id(self) -> str:
        return f"{self.array}_{self.index}"

    @property
    def is_live(self) -> bool:
        """Whether it runs, or will."""
        return self.state not in ENDED

    @property
    def waits(self) -> bool:
        return self.state in WAITS

    def entry(self) -> QueueEntry:
        """As `rcpo.sweep.states` asks for it."""
        return QueueEntry(not self.waits, self.node, self.id)


def clean_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without what belongs to a job, to its step or to a rank that this process may be."""
    return {
        name: value
        for name, value in environ.items()
        if name == "SLURM_CONF"
        or not (name.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_")) or name in RANK_VARIABLES)
    }


def said_by(words: Sequence[str]) -> str:
    """Output of a SLURM command. Raises UserError with its last line when it fails."""
    if shutil.which(words[0]) is None:
        raise UserError(f"{words[0]}: no such program here; use SLURM from one of its login nodes")
    try:
        done = subprocess.run(
            words, env=clean_environment(), capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: no answer within {SECONDS} s; try again when SLURM answers") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{words[0]}: {lines[-1].removeprefix(f'{words[0]}: ').removeprefix('error: ')}")
    return done.stdout


def jobs_of(sweep_id: str, submitted: Mapping[str, int]) -> dict[int, Job]:
    """The newest job of each cell, by the cell's index in the manifest; a live one rather than an ended one.

    Jobs are known by their comment, so those submitted by hand are found too, and where a site rewrites
    comments by `submitted`: job id of an array to the index of its first cell.
    """
    newest: dict[int, Job] = {}
    for job in _read_jobs(sweep_id, submitted):
        known = newest.get(job.cell)
        if known is None or (known.is_live, int(known.array)) < (job.is_live, int(job.array)):
            newest[job.cell] = job
    return newest


def live_jobs(sweep_id: str, submitted: Mapping[str, int]) -> list[Job]:
    """All jobs of the sweep that run or wait."""
    return [job for job in _read_jobs(sweep_id, submitted) if job.is_live]


def _read_jobs(sweep_id: str, submitted: Mapping[str, int]) -> Iterator[Job]:
    output = said_by(["squeue", "--me", "--array", "--noheader", "--states=all", f"--format={FIELDS}"])
    for line in output.splitlines():
        array, index, state, node, why, comment = line.split("|", 5)
        parts = comment.split(":")
        if parts[:2] == [COMMENT, sweep_id]:
            first = int(parts[2])
        elif parts[0] != COMMENT and array in submitted:
            first = submitted[array]
        else:
            continue
        yield Job(array, int(index), state, node or None, why, first + int(index))


def max_array_size() -> int:
    """MaxArraySize of the cluster: indices of an array lie below it."""
    for line in said_by(["scontrol", "show", "config"]).splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize":
            return int(value)
    return DEFAULT_MAX_ARRAY_SIZE
