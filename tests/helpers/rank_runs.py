"""Trainings of run folders by one or more ranks, each a child of the fork server.

A job trains a run folder's frozen config with `rcpo.training.loop.train`, as `rcpo.launch.worker` does, but
for the picture at its end; it may be killed at a given moment. `do_jobs` runs jobs of one rank two at a time.
"""

import math
import os
import random
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import rcpo.training.checkpoint
import rcpo.training.ending
import rcpo.training.loop
from helpers import forked
from helpers.masters import record_masters
from rcpo.monitor.sinks import JsonlSink
from rcpo.ranks.distributed import initialize, rank, shut_down, world_size
from rcpo.ranks.environment import RANK_VARIABLES
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.training.loop import train
from rcpo.training.measurement import Measurement
from rcpo.training.micro_batch import MicroBatch
from rcpo.training.read_inputs import read_inputs
from rcpo.training.state import Training

Moment: TypeAlias = Literal["row", "checkpoint", "export", "signal", "nan"]
LANES = 2
"""Ranks that run at once."""


@dataclass(frozen=True)
class Job:
    """One training of a run folder by all ranks."""

    run: str
    resume: bool = False
    killed_at: tuple[Moment, int] | None = None
    """row, checkpoint, export: rank 0 ends itself with SIGKILL when the row of that step is written, when the
    checkpoint of that step is whole but not yet in its place, or when final/ is. signal: rank 0 alone gets
    SIGTERM when that row is written. nan: the last rank's last pair loses its reference in that step."""
    killed_after_seconds: float | None = None
    """Rank 0 is sent SIGKILL so long after its process was forked; it may be done by then. `seconds_file`
    says how long it took."""
    lost_at: int | None = None
    """The last rank's last pair loses its reference in that step, and the run is to go on."""
    masters: str | None = None
    """Folder for the fp32 weights before and after every step."""


class _Running:
    """The ranks of a job."""

    def __init__(self, job: Job, num_ranks: int) -> None:
        self._job, self.run = job, job.run
        folder = Path(job.run).parent
        shared = dict(
            zip(RANK_VARIABLES, ("", str(num_ranks), "", "127.0.0.1", str(kept_port())), strict=True)
        )
        shared["RCPO_CACHE"] = str(folder / "cache")
        self.ranks = [
            forked.server().start(
                "helpers.rank_runs:rank_of_job", asdict(job), cwd=folder,
                env=os.environ | shared | {"RANK": str(number), "LOCAL_RANK": str(number)},
                output=(log := Path(f"{job.run}.rank-{number}.log")), errors=log,
            )
            for number in range(num_ranks)
        ]  # fmt: skip
        self._started = 0.0
        self._limit = job.killed_after_seconds

    def is_done(self) -> bool:
        """Whether all ranks have ended as they should; an AssertionError shows what one says that has not."""
        codes = [child.poll() for child in self.ranks]
        if self._job.killed_after_seconds is not None:
            return self._kill_in_time()
        for child, code in zip(self.ranks, codes, strict=True):
            # Of a killed job, rank 0 is killed and the others fail.
            good = code is None or (code == 0) == (self._job.killed_at is None)
            assert good, f"{self._job} ended with {code}\n{child.said()}"
        return None not in codes

    def _kill_in_time(self) -> bool:
        """End rank 0 when its time is up and the others 5 seconds later; however they end is fine."""
        first, *others = self.ranks
        self._started = self._started or (first.started() and time.monotonic())
        seconds = time.monotonic() - self._started
        file = seconds_file(self._job)
        if first.code is None:
            if seconds < self._job.killed_after_seconds:
                return False
            first.kill()
        if not file.exists():
            file.write_text(str(seconds))
        ended = time.monotonic() + 5  # they may wait for a rank that never came up
        while any(child.poll() is None for child in others) and time.monotonic() < ended:
            forked.server().listen(ended - time.monotonic())
        self.end()
        return True

    def end(self) -> None:
        for child in self.ranks:
            child.kill()

    def said(self) -> str:
        return "\n".join(child.said() for child in self.ranks)


def kept_port() -> int:
    """A free port below those that the system hands out by itself: nobody has it until ranks listen."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(12_000, 32_000)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def train_all(runs: Sequence[RunFolder], num_ranks: int, timeout_seconds: float) -> None:
    """Train every run from its start to its end."""
    do_jobs([Job(str(run.path)) for run in runs], num_ranks, timeout_seconds)


def do_jobs(jobs: Sequence[Job], num_ranks: int, timeout_seconds: float) -> None:
    """Do the jobs on `num_ranks` ranks each, those of one run in their order; an AssertionError shows the
    output of one that failed, and nothing of them is left running."""
    waiting, running = list(jobs), list[_Running]()
    deadline = time.monotonic() + timeout_seconds
    try:
        while waiting or running:
            taken = {job.run for job in running}
            free = [job for job in waiting if job.run not in taken]
            if free and (len(running) + 1) * num_ranks <= max(LANES, num_ranks):
                waiting.remove(free[0])
                running.append(_Running(free[0], num_ranks))
                continue
            forked.server().listen(0.01 if jobs[0].killed_after_seconds is not None else 1)
            running = [job for job in running if not job.is_done()]
            assert time.monotonic() < deadline, "\n".join(job.said() for job in running)
    finally:
        for job in running:
            job.end()


def rank_of_job(fields: dict[str, Any]) -> None:
    """One rank's part of a job, in a child of the fork server."""
    killed_at = fields.pop("killed_at")
    job = Job(**fields, killed_at=None if killed_at is None else tuple(killed_at))
    device = initialize("cpu")
    draw_nothing()
    if job.killed_at is not None:
        die_at(*job.killed_at)
    if job.lost_at is not None:
        lose_a_number_at(job.lost_at)
    if job.masters is not None:
        record_masters(Path(job.masters))
    run, config = open_run(job.run)
    train(config, run, read_inputs(config), device, job.resume)
    if rank() == 0:
        run.update_run(status="done")
    shut_down()


def train_here(run: RunFolder, resume: bool = False) -> None:
    """Train in this process, which is best a fork."""
    device = initialize("cpu")
    draw_nothing()
    try:
        _, config = open_run(str(run.path))
        train(config, run, read_inputs(config), device, resume)
    finally:
        shut_down()


def draw_nothing() -> None:
    """No picture at the end of a training: it takes longer than all the rest."""
    assert callable(rcpo.training.ending.plot_run)
    rcpo.training.ending.plot_run = lambda run, path: None


def seconds_file(job: Job) -> Path:
    """Where a job with `killed_after_seconds` leaves how long it took."""
    return Path(f"{job.run}.seconds")


def die_at(moment: Moment, step: int) -> None:
    """Arrange for this run to be stopped."""
    number = signal.SIGTERM if moment == "signal" else signal.SIGKILL

    def kill_when(is_due: bool) -> None:
        if is_due:
            os.kill(os.getpid(), number)

    if moment == "nan":
        lose_a_number_at(step)
        return
    if rank() != 0:
        return
    if moment in ("row", "signal"):
        log_step = JsonlSink.log_step

        def log_step_and_die(sink: JsonlSink, row: dict[str, float]) -> None:
            log_step(sink, row)
            kill_when(row["step"] == step)

        JsonlSink.log_step = log_step_and_die  # type: ignore[method-assign]
        return
    if moment == "export":
        card = rcpo.training.ending.model_card

        def die_before_the_model_is_in_place(*args: Any) -> str:
            kill_when(True)
            return card(*args)

        rcpo.training.ending.model_card = die_before_the_model_is_in_place
        return
    complete = rcpo.training.checkpoint._complete

    def die_before_completing(beside: Path, place: Path, *known: Any) -> None:
        kill_when(place.name == f"step-{step:06d}")
        complete(beside, place, *known)

    rcpo.training.checkpoint._complete = die_before_completing


def lose_a_number_at(step: int) -> None:
    """Let the last rank's last pair have no reference in that step, as a damaged cache would."""
    micro_batches = rcpo.training.loop.micro_batches_of

    def with_nan(training: Training, measurement: Measurement) -> list[MicroBatch]:
        batches = micro_batches(training, measurement)
        if training.state.step + 1 == step and rank() == world_size() - 1:
            ref_w = batches[-1].ref_w.clone()
            ref_w[-1] = math.nan
            batches[-1] = batches[-1]._replace(ref_w=ref_w)
        return batches

    rcpo.training.loop.micro_batches_of = with_nan
