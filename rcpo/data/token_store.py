"""Tokenised pairs, kept: made once for all ranks, cells and starts, then mapped from a file.

Owns the files RCPO_CACHE/tokens/KEY.safetensors: atomic, checked by digest, read-only once mapped. Does not
know what a key depends on (`rcpo.data.token_key`). Whatever is wrong with the folder is a warning: pairs can
always be made again. Called by `rcpo.training.read_inputs`.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcpo.common.locks import kernel_lock
from rcpo.data.pairs import PackedPairs, PairArrays

logger = logging.getLogger(__name__)

Array = NDArray[Any]

SETS = ("train", "held_out")
DTYPES: dict[str, np.dtype[Any]] = {
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
"""Those of `PairArrays`, by safetensors' names."""
BLOCK_BYTES = 1 << 20


class Tokens(NamedTuple):
    """What reading and tokenising gives."""

    train: PackedPairs
    held_out: PackedPairs
    report: list[str]
    """Lines for the log."""


class TokenStore:
    """The file of one key."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / f"{key}.safetensors"

    def read_or_make(self, make: Callable[[], Tokens], is_current: Callable[[], bool]) -> Tokens:
        """The tokens of the file; else those that `make` gives, which are then kept where `is_current` says
        that they still belong to the key. Processes that come together wait for the first of them."""
        tokens = self.read()
        if tokens is not None:
            return tokens
        with contextlib.ExitStack() as stack:
            self._wait_for_turn(stack)
            tokens = self.read()
            if tokens is not None:
                return tokens
            tokens = make()
            if is_current():
                self.write(tokens)
        # The file's pages are shared by all ranks, and the system may take them back.
        return self.read() or tokens

    def read(self) -> Tokens | None:
        """What is in the file, as views of a read-only mapping; None where there is none, or with a warning
        where it is damaged."""
        try:
            with self.path.open("rb") as stream:
                return _read(stream)
        except (FileNotFoundError, NotADirectoryError):
            return None
        # Of a damaged header each step fails in a way of its own.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            _warn_once(
                f"{self.path} cannot be read ({error}): the data are tokenised again, and it is replaced"
            )
            return None

    def write(self, tokens: Tokens) -> None:
        """Keep `tokens`: a whole file or none. A warning where that cannot be."""
        beside = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as stream:
                _write(stream, tokens)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(self.path)
        except OSError as error:
            self._warn_unwritable(error)
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)

    def _wait_for_turn(self, stack: contextlib.ExitStack) -> None:
        """Hold the key's lock until `stack` ends, or the process does; where there can be no lock, go on."""
        try:
            lock = kernel_lock(self.path.with_suffix(".lock"))
            try:
                stack.enter_context(lock.acquire(blocking=False))
            except TimeoutError:
                logger.info("another process tokenises the same data; waiting for it")
                stack.enter_context(lock.acquire())
            for left in self.path.parent.glob(f"{self.path.stem}.*.tmp"):  # of a process that was killed
                left.unlink(missing_ok=True)
        except OSError as error:
            self._warn_unwritable(error)

    def _warn_unwritable(self, error: Exception) -> None:
        _warn_once(f"{self.path.parent} cannot be written ({error}): every start tokenises the data again")


@functools.cache
def _warn_once(message: str) -> None:
    """Once a process: a run reads its data before it has a folder, and again in its ranks."""
    logger.warning("%s", message)


def _write(stream: BinaryIO, tokens: Tokens) -> None:
    """As safetensors: the length of the header, the header as JSON, the arrays. Written here because that
    library's files are for their owner alone, and many share a cache."""
    arrays = {
        f"{name}.{part}": np.ascontiguousarray(array)
        for name, pairs in zip(SETS, (tokens.train, tokens.held_out), strict=True)
        for part, array in pairs.arrays._asdict().items()
    }
    # Wider numbers first, so that every array is aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {}
    place = 0
    for name in names:
        array = arrays[name]
        header[name] = {
            "dtype": next(key for key, dtype in DTYPES.items() if dtype == array.dtype),
            "shape": list(array.shape),
            "data_offsets": [place, place + array.nbytes],
        }
        place += array.nbytes
    report = json.dumps(tokens.report)
    digest = _digest_of_head(header, report)
    for name in names:
        digest.update(arrays[name].data)
    header["__metadata__"] = {"report": report, "digest": digest.hexdigest()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        stream.write(arrays[name].data)


def _read(stream: BinaryIO) -> Tokens:
    """Raises ValueError and its like where the file is not what `_write` wrote."""
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if length > size:
        raise ValueError("it is not whole")
    entries = json.loads(stream.read(length))
    metadata = entries.pop("__metadata__")
    digest = _digest_of_head(entries, metadata["report"])
    # By reading, not through the mapping, whose pages would count as this process's memory.
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
    if digest.hexdigest() != metadata["digest"]:
        raise ValueError("it is not what was written")
    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    sets = [
        PackedPairs(
            PairArrays(
                *(_array(mapped, 8 + length, entries[f"{name}.{part}"]) for part in PairArrays._fields)
            )
        )
        for name in SETS
    ]
    return Tokens(sets[0], sets[1], json.loads(metadata["report"]))


def _digest_of_head(entries: Mapping[str, Any], report: str) -> hashlib.blake2b:
    return hashlib.blake2b(json.dumps([entries, report]).encode())


def _array(mapped: mmap.mmap, start: int, entry: Mapping[str, Any]) -> Array:
    shape: list[int] = entry["shape"]
    first = start + entry["data_offsets"][0]
    return np.frombuffer(mapped, DTYPES[entry["dtype"]], math.prod(shape), first).reshape(shape)
