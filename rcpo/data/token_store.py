"""Tokenised pairs, kept: made once for all ranks, cells and starts, then mapped from files.

Owns the folders RCPO_CACHE/tokens/KEY: numpy's files and tokens.json, whole or absent, checked by digest,
read-only once mapped. Does not know what a key depends on (`rcpo.data.token_key`). Whatever is wrong with the
cache is a warning: pairs can always be made again. Called by `rcpo.training.read_inputs`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rcpo.common.files import remove, replacing
from rcpo.common.locks import kernel_lock
from rcpo.data.pairs import PackedPairs, PairArrays
from rcpo.records.account import Account, account_of

logger = logging.getLogger(__name__)

FILES = {name: [f"{name}.{part}.npy" for part in PairArrays._fields] for name in ("train", "held_out")}
ABOUT = "tokens.json"
UNUSED_DAYS = 30
"""What nobody has read for so long is removed. Far longer than a run may map it: over NFS, a file that
another machine removes is gone for those that have mapped it too."""


class Tokens(NamedTuple):
    """What reading and tokenising gives."""

    train: PackedPairs
    held_out: PackedPairs
    report: list[str]
    """Lines for the log."""
    account: Account
    """What became of every row, before data.filter."""


class TokenStore:
    """The folder of one key."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / key

    def read_or_make(self, make: Callable[[], Tokens], is_current: Callable[[], bool]) -> Tokens:
        """The tokens that are kept; else those that `make` gives, which are then kept where `is_current` says
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
        # The files' pages are shared by all ranks, and the system may take them back.
        return self.read() or tokens

    def read(self) -> Tokens | None:
        """What is kept, as views of read-only mappings; None where nothing is, or with a warning where it is
        damaged."""
        if not self.path.is_dir():
            return None
        try:
            tokens = _read(self.path)
        # Damaged JSON fails in ways of its own.
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _warn_once(
                f"{self.path} cannot be read ({error}): the data are tokenised again, and it is replaced"
            )
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)  # for `_remove_unused`
        return tokens

    def write(self, tokens: Tokens) -> None:
        """Keep `tokens`: all or nothing. A warning where that cannot be."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_unused(self.path.parent)
            with replacing(self.path) as beside:
                _write(beside, tokens)
        except OSError as error:
            self._warn_unwritable(error)

    def _wait_for_turn(self, stack: contextlib.ExitStack) -> None:
        """Hold the key's lock until `stack` ends, or the process does; where there can be no lock, go on."""
        lock = kernel_lock(self.path.with_suffix(".lock"))
        try:
            try:
                stack.enter_context(lock.acquire(blocking=False))
            except TimeoutError:
                logger.info("another process tokenises the same data; waiting for it")
                stack.enter_context(lock.acquire())
        except OSError as error:
            self._warn_unwritable(error)

    def _warn_unwritable(self, error: Exception) -> None:
        _warn_once(f"{self.path.parent} cannot be written ({error}): every start tokenises the data again")


@functools.cache
def _warn_once(message: str) -> None:
    """Once a process: a run reads its data before it has a folder, and again in its ranks."""
    logger.warning("%s", message)


def _write(folder: Path, tokens: Tokens) -> None:
    folder.mkdir()
    for files, pairs in zip(FILES.values(), (tokens.train, tokens.held_out), strict=True):
        for file, array in zip(files, map(np.asarray, pairs.arrays), strict=True):
            np.save(folder / file, array)
    said = {"report": tokens.report, "account": dataclasses.asdict(tokens.account)}
    about = said | {"digest": _digest(folder, said)}
    (folder / ABOUT).write_text(json.dumps(about))


def _read(folder: Path) -> Tokens:
    """Raises ValueError and its like where the folder is not what `_write` wrote."""
    about = json.loads((folder / ABOUT).read_text())
    if _digest(folder, {key: about[key] for key in ("report", "account")}) != about["digest"]:
        raise ValueError("it is not what was written")
    train, held_out = (
        # A plain array: a slice of numpy's class for mappings costs forty times as much.
        PackedPairs(PairArrays(*(np.asarray(np.load(folder / file, mmap_mode="r")) for file in files)))
        for files in FILES.values()
    )
    return Tokens(train, held_out, about["report"], account_of(about["account"]))


def _digest(folder: Path, said: dict[str, Any]) -> str:
    """By reading, not through mappings, whose pages would count as this process's memory."""
    digest = hashlib.blake2b(json.dumps(said).encode())
    for file in (file for files in FILES.values() for file in files):
        with (folder / file).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _remove_unused(folder: Path) -> None:
    """What nobody has used for UNUSED_DAYS, and what killed processes and older versions left."""
    oldest = time.time() - UNUSED_DAYS * 86400
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may be faster
            if path.stat().st_mtime < oldest:
                remove(path)
                logger.info("%s: removed, because nobody has used it for %d days", path, UNUSED_DAYS)
