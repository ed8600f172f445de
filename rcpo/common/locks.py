"""Who runs a run or a sweep: an flock on a file beside it, held for as long as the process lives.

The system gives a lock back when its holder dies, however it dies, so a held lock means a live process. The
file says which. Light to import: `rcpo resume` takes the lock before anything slow.
"""

import contextlib
import fcntl
import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS_FOR_READERS = 2.0
"""How long taking a lock may be disturbed by those that only look whether it is held."""


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


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock while open; HeldError when another process has it. On a file system without locks nothing
    is held. OSError where the file cannot be made."""
    with path.open("a+") as stream:
        deadline = time.monotonic() + SECONDS_FOR_READERS
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HeldError(read_holder(path)) from None
                time.sleep(0.05)
            except OSError:
                break
        stream.truncate(0)
        stream.write(json.dumps({"pid": os.getpid(), "host": platform.node()}))
        stream.flush()
        yield


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
