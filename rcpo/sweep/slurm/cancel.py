"""Cancel what SLURM has of a sweep: the jobs that train its cells, and those that evaluate them."""

import time
from collections.abc import Sequence

from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.slurm import evaluation, submit
from rcpo.sweep.slurm.queue import Job, said_by
from rcpo.sweep.slurm.submit import cells_text

PATIENCE_SECONDS = 120.0
"""How long `cancel` waits for jobs to end: they write checkpoints."""
NUM_IDS_AT_ONCE = 500


def cancel(sweep: SweepFolder) -> int:
    """Cancel this sweep's jobs, and no others; they have KillWait (30 s by default) for a checkpoint."""
    jobs = _live(sweep)
    for start in range(0, len(jobs), NUM_IDS_AT_ONCE):
        said_by(["scancel", *(job.id for job in jobs[start : start + NUM_IDS_AT_ONCE])])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while left := _live(sweep):
        if time.monotonic() > deadline:
            print(f"{cells_text(len(left))} still end: {', '.join(job.id for job in left[:10])}")
            return 1
        time.sleep(0.5)
    print(f"cancelled {len(jobs)} jobs" if jobs else "nothing of this sweep is queued or runs")
    return 0


def _live(sweep: SweepFolder) -> Sequence[Job]:
    return [*submit.jobs_that_live(sweep), *evaluation.jobs_that_live(sweep)]
