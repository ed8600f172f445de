"""Trainings on the device of `pytest -m gpu`: each rank a process of its own, as `rcpo` starts it, and one
that is watched from inside.

`RCPO_GPU_TESTS_ON=cpu` puts all of them on the CPU, as children of the fork server: a rehearsal of the tests
where no GPU is. CUDA does not outlive a fork, so on a GPU every process is a real start.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from helpers import ROOT, forked
from helpers.cases import Case, Layout, make_config, make_run
from rcpo.config.resolved import ResolvedConfig
from rcpo.runs.folder import RunFolder

DEVICE = os.environ.get("RCPO_GPU_TESTS_ON", "cuda")
ON_GPU = DEVICE == "cuda"
SECONDS = 180 if ON_GPU else 900
"""Longest that one training may take; a rehearsal may share its cores with others."""


def device_name() -> str:
    """For the report of a run of the tests."""
    name = torch.cuda.get_device_name() if ON_GPU else "the CPU, in rehearsal"
    return f"{name}, torch {torch.__version__}"


def rcpo(*words: str, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """`rcpo WORDS` in a process of its own."""
    if not ON_GPU:
        return forked.rcpo(*words, cwd=Path.cwd(), env=environment(), seconds=seconds)
    return subprocess.run(
        [sys.executable, "-m", "rcpo.cli", *words],
        env=environment(), capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """This process's, with rcpo and the helpers to be found."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def trained(run: RunFolder) -> RunFolder:
    """Train a run folder that is made, to its end."""
    done = rcpo("resume", str(run.path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return run


def made(
    inputs: Path, folder: Path, case: Case, layout: Layout, *words: str
) -> tuple[ResolvedConfig, RunFolder]:
    """A run on the device, not yet trained."""
    config = make_config(inputs, folder, case, layout, *words, f"train.device={DEVICE}")
    return config, make_run(config)


class Started:
    """A training that runs: a real process, or a child of the fork server."""

    def __init__(self, run: RunFolder) -> None:
        words = ["resume", str(run.path)]
        self._said = run.path.with_name(f"{run.path.name}.started.log")
        self._child: subprocess.Popen[bytes] | forked.Child
        if ON_GPU:
            with self._said.open("ab") as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "rcpo.cli", *words], env=environment(), stdout=log, stderr=log
                )
            self.pid = self._child.pid
        else:
            self._child = forked.start_rcpo(
                *words, cwd=Path.cwd(), env=environment(), output=self._said, errors=self._said
            )
            self.pid = self._child.started()

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._child.poll()

    def wait(self) -> int:
        return self._child.wait(SECONDS)

    def kill(self) -> None:
        """End what is left of it."""
        self._child.kill()
        self._child.wait(SECONDS)

    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def ranks(self) -> list[int]:
        """Process ids of the ranks that it has started, the first rank first. A process's environment is
        that of its start; forked ranks come in the order of their making."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        if not ON_GPU:
            return list(map(int, children))
        found = {}
        for child in map(int, children):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            number = next((each[5:] for each in environment if each.startswith(b"RANK=")), None)
            if number is not None:
                found[int(number)] = child
        return [found[number] for number in sorted(found)]


@contextlib.contextmanager
def started(run: RunFolder, num_rows: int) -> Iterator[Started]:
    """The process that trains a run folder, once it has written so many rows; nothing of it is left
    afterwards."""
    process = Started(run)
    deadline = time.monotonic() + SECONDS
    try:
        while not (run.metrics.exists() and len(run.rows(run.metrics)) >= num_rows):
            assert process.poll() is None, process.said()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()


@dataclass
class Watched:
    """What a training looks like from inside."""

    rehearsal_bytes: int = 0
    """Peak memory of everything up to the first step."""
    steps_bytes: int = 0
    """Peak memory of the steps."""
    syncs: list[list[str]] = field(default_factory=list)
    """Of each step: where the host waited for the device, as far as CUDA warns of it."""


def watched(run: RunFolder) -> Watched:
    """Train a run folder of one rank, with a look at every step."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.device_runs", str(run.path)],
        env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Watched(**json.loads((run.path / "watched.json").read_text()))


def _watch(folder: str) -> None:
    from rcpo.ranks.distributed import initialize, shut_down
    from rcpo.runs.frozen import open_run
    from rcpo.training import loop
    from rcpo.training.micro_batch import MicroBatch
    from rcpo.training.read_inputs import read_inputs
    from rcpo.training.state import Training
    from rcpo.training.step import TrainedStep

    seen = Watched()
    caught = warnings.catch_warnings(record=True)
    said: list[Any] = []

    class Watch(loop.StepWatch):
        def before(self, training: Training, micro_batches: Sequence[MicroBatch]) -> None:
            nonlocal caught, said
            if not ON_GPU:
                return
            if not seen.rehearsal_bytes:
                seen.rehearsal_bytes = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            caught = warnings.catch_warnings(record=True)
            said = caught.__enter__() or []
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

        def after(self, trained: TrainedStep) -> None:
            if not ON_GPU:
                return
            torch.cuda.set_sync_debug_mode("default")
            caught.__exit__(None, None, None)
            waits = [each for each in said if "synchroniz" in str(each.message)]
            seen.syncs.append([f"{Path(each.filename).name}:{each.lineno}" for each in waits])
            seen.steps_bytes = torch.cuda.max_memory_allocated()

    run, config = open_run(folder)
    device = initialize(config.train.device)
    try:
        loop.train(config, run, read_inputs(config), device, False, Watch())
    finally:
        shut_down()
    (run.path / "watched.json").write_text(json.dumps(asdict(seen)))


if __name__ == "__main__":
    _watch(sys.argv[1])
