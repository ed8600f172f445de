"""SIGTERM and SIGUSR2, and the end of a job's time: a scheduler wants the machine back, and the run should
stop where it can go on later.

Inside `deferred` a signal is noted and the training loop stops all ranks together after the step, with a
checkpoint (`asked`). Outside, before there is anything to save, rank 0 stops at once, with a word in
run.json; the other ranks are ended by the signal itself: one that waits in a collective would not hear it.
Called by `rcpo.launch.worker` and `rcpo.training.loop`. The state is the process's, as its signal handlers
are."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType

from rcpo.common.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

_received: signal.Signals | None = None
_is_deferred = False


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    is_first, _received = _received is None, signal.Signals(number)
    if is_first and not _is_deferred:  # a second one finds the run stopping already
        raise StoppedError(f"stopped by {_received.name} before the first step")


def stop_at_once() -> None:
    """Let either signal raise StoppedError in this process, as Ctrl-C raises KeyboardInterrupt."""
    global _received
    _received = None
    _handle_with(_note)


def stop_silently() -> None:
    """Let either signal end this process, as it does by default: there is nothing left to say."""
    _handle_with(signal.SIG_DFL)


def _handle_with(handler: object) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, handler)  # type: ignore[arg-type]


@contextlib.contextmanager
def _handled_with(handler: object) -> Iterator[None]:
    """While open; then as before."""
    saved = [(number, signal.getsignal(number)) for number in SIGNALS]
    _handle_with(handler)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, before in saved:
                signal.signal(number, before)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While open, a signal only makes `asked` true."""
    global _is_deferred, _received
    _is_deferred, _received = True, None
    with _handled_with(_note):
        try:
            yield
        finally:
            _is_deferred = False


def interrupting() -> contextlib.AbstractContextManager[None]:
    """While open, a signal raises InterruptedError: for work that may be left, and asked for again."""
    return _handled_with(_interrupt)


def ending() -> contextlib.AbstractContextManager[None]:
    """While open, a signal raises KeyboardInterrupt, as Ctrl-C does: for a command that ends processes of its
    own first."""
    return _handled_with(_end)


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise InterruptedError(f"stopped by {signal.Signals(number).name}")


def asked() -> bool:
    """Whether a signal has asked this process to stop since `deferred` began."""
    return _received is not None


def signal_name(default: str = "SIGTERM") -> str:
    """The newest such signal; where another rank was asked, SIGTERM is as good a name."""
    return default if _received is None else _received.name


LEAST_SECONDS = 30.0
"""Kept free before the end of a job's time, beside what a stop takes."""
TORCHRUN_SECONDS = 30.0
"""After a SIGTERM, until torchrun ends its ranks, where TORCH_ELASTIC_SHUTDOWN_TIMEOUT says nothing."""


@dataclass
class TimeLeft:
    """Whether a stop must begin now to be through before SLURM ends the job: by what saves and steps took so
    far, whatever `signal_seconds` of a profile says."""

    env: Mapping[str, str]
    longest_save: float = 0.0
    longest_step: float = 0.0
    _has_warned: bool = False

    def needed(self) -> float:
        """Seconds from asking to a checkpoint in its place: the step under way, one more before the ranks can
        hear of it, and a save half as long again as any before."""
        return 2 * self.longest_step + 1.5 * self.longest_save + LEAST_SECONDS

    def is_up(self) -> bool:
        """By SLURM_JOB_END_TIME, in seconds since the epoch; never where it is not set, nor in a job that was
        short of that from its start, which could not do a step."""
        end = float(self.env.get("SLURM_JOB_END_TIME", "inf") or "inf")
        start = float(self.env.get("SLURM_JOB_START_TIME", "-inf") or "-inf")
        return end - time.time() < self.needed() < (end - start) / 2 if math.isfinite(end) else False

    def note_save(self, seconds: float) -> str | None:
        """Take note of a save; returns a warning, once, where torchrun would not wait for it."""
        self.longest_save = max(self.longest_save, seconds)
        if self._has_warned or "TORCHELASTIC_RUN_ID" not in self.env:
            return None
        patience = float(self.env.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TORCHRUN_SECONDS))
        if self.needed() - LEAST_SECONDS <= patience:
            return None
        self._has_warned = True
        return (
            f"a checkpoint takes {seconds:.0f} s, and torchrun ends its ranks {patience:.0f} s after a "
            f"SIGTERM: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={math.ceil(self.needed())}, or type torchrun "
            f"--shutdown-timeout {math.ceil(self.needed())}"
        )


def of_this_job() -> TimeLeft:
    return TimeLeft(os.environ)
