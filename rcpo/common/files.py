"""Files and folders that are replaced whole or not at all, and where the user's cache is."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

REPLACED = ".old"
"""Ending of a folder that another takes the place of just now."""


def write_atomically(path: Path, content: str | bytes, by_many: bool = False) -> None:
    """Replace the file `path`: a reader sees the old one or the new one, never a part. `by_many`: other
    processes may do the same now."""
    with replacing(path, by_many) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path, by_many: bool = False) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder at, which takes the place of `path` at the end; when
    what happens inside raises, nothing of it is left."""
    beside = path_beside(path, by_many)
    remove(beside)
    try:
        yield beside
        put_in_place(beside, path)
    except BaseException:
        remove(beside)
        raise


def path_beside(path: Path, by_many: bool = False) -> Path:
    """Hidden, and on the same file system: .NAME.tmp, or with `by_many` a name that is this process's."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp" if by_many else f".{path.name}.tmp")


def put_in_place(beside: Path, path: Path) -> None:
    """Rename `beside`, a file or a folder, to `path`, once all of it is on disk. A folder that stands there
    is .NAME.old until the new one has its place."""
    if not beside.is_dir():
        _fsync(beside)
        os.replace(beside, path)
        return
    for part in sorted(beside.rglob("*"), reverse=True):  # what is in a folder before the folder
        _fsync(part)
    _fsync(beside)
    old = path.with_name(f".{path.name}{REPLACED}")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(beside, path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """A file or a folder, as far as that can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def cache_dir() -> Path:
    """RCPO_CACHE, else the XDG cache folder's rcpo."""
    if "RCPO_CACHE" in os.environ:
        return Path(os.environ["RCPO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rcpo"
