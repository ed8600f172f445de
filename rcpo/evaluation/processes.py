"""Several runs evaluated at the same time on this machine: `rcpo evaluate RUN` for each, in a process of its
own, and where there are GPUs one process a GPU.

Owns the processes' lives. Results are in the runs' folders, where `rcpo.evaluation.tasks` finds them; what a
process said is in RUN/logs/evaluation.log. A run that fails stops no other one."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rcpo.common.console import duration
from rcpo.common.errors import UserError
from rcpo.ranks.stopping import interrupting
from rcpo.runs.folder import RunFolder

SECONDS_BETWEEN_LOOKS = 0.1
LOG_NAME = "evaluation.log"
GRACE_SECONDS = 30.0
"""Between asking processes to end and ending them; vLLM takes 20 to end its own."""


def num_processes(num_runs: int, asked: int | None) -> int:
    """How many evaluate at the same time: as many as `asked`, else one a GPU. Raises UserError where there
    are fewer GPUs than that."""
    gpus = _visible_gpus()
    if asked is not None and gpus and asked > len(gpus):
        raise UserError(
            f"--parallel {asked}: {len(gpus)} GPU{'s' if len(gpus) > 1 else ''} can be used here, and each "
            f"takes one process; type --parallel {len(gpus)}"
        )
    return min(num_runs, asked or len(gpus) or 1)


def _visible_gpus() -> list[str]:
    """Their names in CUDA_VISIBLE_DEVICES."""
    num = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [name.strip() for name in named] if len(named) == num else [str(number) for number in range(num)]


def evaluate_runs(
    runs: Sequence[RunFolder], words: Sequence[str], num_at_once: int, say: Callable[[str], object]
) -> dict[Path, str]:
    """Evaluate with these settings and flags; returns why, for the runs that failed. Ctrl-C and SIGTERM end
    all processes and raise KeyboardInterrupt."""
    waiting, busy = list(runs), dict[str, _Child]()
    places = _visible_gpus()[:num_at_once] or [f"cpu{number}" for number in range(num_at_once)]
    failed: dict[Path, str] = {}
    num_ended = 0
    try:
        with interrupting():
            while waiting or busy:
                for place in places:
                    if waiting and place not in busy:
                        busy[place] = _Child(waiting.pop(0), words, place, num_at_once)
                for place, child in list(busy.items()):
                    if child.process.poll() is None:
                        continue
                    del busy[place]
                    num_ended += 1
                    if child.process.returncode:
                        failed[child.run.path] = child.last_line()
                    name, took = child.run.path.name, duration(child.seconds())
                    why = f", failed: {failed[child.run.path]}" if child.process.returncode else ""
                    say(f"{num_ended}/{len(runs)} {name}: {took}{why}")
                time.sleep(SECONDS_BETWEEN_LOOKS)
    except InterruptedError:
        raise KeyboardInterrupt from None
    finally:
        _end(list(busy.values()))
    return failed


def _end(children: Sequence["_Child"]) -> None:
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, deadline - time.monotonic()))
        child.process.kill()
        child.process.wait()


class _Child:
    """The process of one run."""

    def __init__(self, run: RunFolder, words: Sequence[str], place: str, num_at_once: int) -> None:
        self.run, self._started = run, time.monotonic()
        own = {} if place.startswith("cpu") else {"CUDA_VISIBLE_DEVICES": place}
        threads = str(max(1, (os.cpu_count() or 1) // num_at_once))
        run.logs.mkdir(parents=True, exist_ok=True)
        with (run.logs / LOG_NAME).open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rcpo.cli", "evaluate", str(run.path), *words],
                env={"OMP_NUM_THREADS": threads} | os.environ | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def last_line(self) -> str:
        with (self.run.logs / LOG_NAME).open("rb") as log:
            log.seek(self._log_start)
            lines = log.read()[-4096:].decode("utf-8", "replace").splitlines()
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return said.removeprefix("rcpo: ") or f"exit code {self.process.returncode}"
