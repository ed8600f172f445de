"""Files and folders that are replaced whole or not at all, and where the user's cache is."""

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

REPLACED = ".old"
"""Ending of a folder that another takes the place of just now."""


class FileEntry(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


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


class HashedFile(io.RawIOBase):
    """A new file whose SHA-256 is known when it is closed, and which is on disk then: nothing of it has to be
    read again, and no other process has to vouch for it."""

    def __init__(self, path: Path) -> None:
        self._file, self._digest, self._num_bytes = path.open("wb"), hashlib.sha256(), 0
        self._is_broken = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._is_broken = True
        self._file.write(data)
        self._is_broken = False
        self._digest.update(data)
        num_bytes = memoryview(data).nbytes
        self._num_bytes += num_bytes
        return num_bytes

    def close(self) -> None:
        if not self.closed:
            try:
                if not self._is_broken:  # what broke it has been said
                    self._file.flush()
                    os.fsync(self._file.fileno())
            finally:
                self._file.close()
                super().close()

    def entry(self) -> FileEntry:
        return {"bytes": self._num_bytes, "sha256": self._digest.hexdigest()}


def entry_of(path: Path) -> FileEntry:
    """By reading it."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
