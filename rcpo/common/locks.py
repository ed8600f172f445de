"""Kernel locks on files: who runs a run or a sweep, and whose turn it is to fill a cache.

The system gives a lock back when its holder dies, however it dies, so a held lock means a live process. The
library filelock takes the locks. `is_held` is ours: many may look at the same time, which takes a shared
flock, and filelock has none. Light to import: `rcpo resume` takes the lock before anything slow.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import UnixFileLock

FOR_EVER = -1.0
"""As filelock has it."""
SECONDS_FOR_READERS = 2.0
"""How long taking a lock may be disturbed by those that only look whether it is held."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system without locks answers."""


class HeldError(Exception):
    """The lock is another process's; `holder` is what that wrote."""

    def __init__(self, holder: dict[str, Any]) -> None:
        super().__init__(holder)
        self.holder = holder

    def __str__(self) -> str:
        return f"process {self.holder.get('pid', '?')} on {self.holder.get('host', '?')}"


def run_lock(run: Path) -> Path:
    """The lock file of a run folder."""
    return run / ".lock"


def kernel_lock(path: Path, on_acquired: Callable[[int], None] | None = None) -> "UnixFileLock":
    """The lock of a file, not taken yet, and never one that outlives its process. Taking it raises
    TimeoutError where another has it for longer than `acquire(timeout=SECONDS)`, another OSError where there
    can be none. `on_acquired` gets the file's descriptor."""
    from filelock import UnixFileLock

    return UnixFileLock(path, fallback_to_soft=False, on_acquired=on_acquired)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock while open; HeldError when another process has it. On a file system without locks nothing
    is held. OSError where the file cannot be made."""
    lock = kernel_lock(path, _write_holder)
    try:
        _acquire(lock, SECONDS_FOR_READERS)
    except TimeoutError:
        raise HeldError(read_holder(path)) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def turn_at(path: Path) -> Iterator[None]:
    """Wait for the lock, however long another process has it, and hold it while open. On a file system
    without locks nothing is held. OSError where the file cannot be made."""
    lock = kernel_lock(path)
    _acquire(lock, FOR_EVER)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: "UnixFileLock", seconds: float) -> None:
    """Not taken where the file system has no locks. TimeoutError where another process has it for longer."""
    try:
        lock.acquire(timeout=seconds)
    except OSError as error:  # a TimeoutError is one too, of no number
        if error.errno not in NO_LOCKS:
            raise


def _write_holder(descriptor: int) -> None:
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode(), 0)


def is_held(path: Path) -> bool:
    """Whether a live process holds the lock."""
    try:
        with path.open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def read_holder(path: Path) -> dict[str, Any]:
    """What the last holder wrote: pid and host; empty where it is unreadable."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def end_holder(path: Path, patience_seconds: float) -> bool:
    """Send SIGTERM to the process that holds the lock and wait until it is free; returns whether it is.

    Raises HeldError where the holder is on another host, or not the process that the file names.
    """
    holder = read_holder(path)
    if not _is_here(holder, path):
        raise HeldError(holder)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(holder["pid"]), signal.SIGTERM)
    deadline = time.monotonic() + patience_seconds
    while is_held(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _is_here(holder: dict[str, Any], path: Path) -> bool:
    """Whether the process that the lock's file names is on this host and has that file open."""
    if holder.get("host") != platform.node() or not isinstance(holder.get("pid"), int):
        return False
    files = Path(f"/proc/{holder['pid']}/fd")
    if not Path("/proc/self/fd").is_dir():  # no Linux: the lock is held, and its holder wrote the file
        return True
    with contextlib.suppress(OSError):
        for file in files.iterdir():
            with contextlib.suppress(OSError):
                if file.samefile(path):
                    return True
    return False
