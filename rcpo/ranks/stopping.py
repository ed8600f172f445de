"""SIGTERM and SIGUSR2: a scheduler wants the machine back, and the run should stop where it can go on later.

Inside `deferred` a signal is noted and the training loop stops all ranks together after the step, with a
checkpoint (`asked`). Outside, before there is anything to save, rank 0 stops at once, with a word in
run.json; the other ranks are ended by the signal itself: one that waits in a collective would not hear it.
Called by `rcpo.launch.worker` and `rcpo.training.loop`. The state is the process's, as its signal handlers
are."""

import contextlib
import signal
import threading
from collections.abc import Iterator
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
def deferred() -> Iterator[None]:
    """While open, a signal only makes `asked` true."""
    global _is_deferred, _received
    _is_deferred, _received = True, None
    saved = [(number, signal.getsignal(number)) for number in SIGNALS]
    _handle_with(_note)
    try:
        yield
    finally:
        _is_deferred = False
        if threading.current_thread() is threading.main_thread():
            for number, handler in saved:
                signal.signal(number, handler)


def asked() -> bool:
    """Whether a signal has asked this process to stop since `deferred` began."""
    return _received is not None


def signal_name() -> str:
    """The newest such signal; where another rank was asked, SIGTERM is as good a name."""
    return "SIGTERM" if _received is None else _received.name
