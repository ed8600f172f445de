"""Finished parts of a reference pass, so that one that is killed goes on where it was.

A pass goes through the model in batches that do not depend on the number of ranks. Every `SECONDS` what is
done since is written beside the cache's file, under the hash of its own content. A row there is known by its
whole batch and its place in it, so that what is taken from a part is what an uninterrupted pass computes, to
the last bit, on as many ranks or others. Parts go when the cache's file has their rows. Called by
`rcpo.reference.maker`, which holds the cache's lock meanwhile.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rcpo.common.files import remove, write_atomically
from rcpo.data.batch import collate
from rcpo.data.pairs import SideLogProbs, TokenizedPair
from rcpo.models.evaluation import LogProbModel, batches_by_length
from rcpo.ranks.distributed import from_rank_zero, gather, rank, world_size
from rcpo.reference.cache import KEY_BYTES, ReferenceCache, place_keys

logger = logging.getLogger(__name__)

SECONDS = 60.0
"""Least time between two parts: what a killed pass loses, and one batch."""


class Row(NamedTuple):
    """A side that a part knows."""

    key: bytes
    """What the cache's file will know it by."""
    place: bytes
    """Of the side in its batch."""
    z: float


class Parts:
    """The parts of all passes under one set of weights. Rank 0 has them; the cache's lock is held, where it
    can be."""

    def __init__(self, cache: ReferenceCache) -> None:
        self.folder = cache.path.with_suffix(".parts")
        self._cache = cache

    def read(self) -> dict[bytes, float]:
        """z by place. A part that is not what its name says goes, with a warning: it is computed again."""
        return {row.place: row.z for rows in self._read().values() for row in rows}

    def _read(self) -> dict[str, list[Row]]:
        """The rows of every whole part, by its file's name."""
        found = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                content = file.read_bytes()
                if hashlib.sha256(content).hexdigest() != file.stem:
                    raise ValueError("it is not what was written")
                tensors = load(content)
                keys, places = (_cut(tensors[name]) for name in ("keys", "places"))
                found[file.name] = [
                    Row(*row) for row in zip(keys, places, tensors["z"].tolist(), strict=True)
                ]
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                logger.warning(
                    "%s is damaged (%s): it is removed, and its rows are computed again", file, error
                )
                remove(file)
        return found

    def add(self, rows: Sequence[Row]) -> None:
        """Write one more; a warning where that cannot be. Rows that are not finite are left out."""
        rows = [row for row in rows if math.isfinite(row.z)]
        if not rows:
            return
        keys, places = (
            torch.frombuffer(bytearray(b"".join(each)), dtype=torch.uint8).view(-1, KEY_BYTES)
            for each in ([row.key for row in rows], [row.place for row in rows])
        )
        z = torch.tensor([row.z for row in rows], dtype=torch.float32)
        content = save({"keys": keys, "places": places, "z": z})
        file = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, content, by_many=True)
        except OSError as error:
            logger.warning("%s cannot be written (%s): a pass that is killed starts anew", file, error)

    def remove_known(self) -> None:
        """Remove every part whose rows the cache's file has."""
        if not self.folder.is_dir():
            return
        known = self._cache.read()
        for name, rows in self._read().items():
            if all(row.key in known for row in rows):
                remove(self.folder / name)
        if not any(self.folder.iterdir()):
            remove(self.folder)


def _cut(keys: Tensor) -> list[bytes]:
    content = keys.numpy().tobytes()
    return [content[start : start + KEY_BYTES] for start in range(0, len(content), KEY_BYTES)]


class Passes(Protocol):
    """How pairs go through a model: forward passes that do not depend on each other."""

    @property
    def members(self) -> Sequence[Sequence[int]]:
        """Of each pass, which of the pairs it scores; each pair stands once."""

    def places(self, number: int) -> list[tuple[bytes, bytes]]:
        """Of a pass's members: their sides, known by all that goes through the model with them."""

    def z(self, number: int) -> Tensor:
        """(2, n) of the members, chosen and rejected, on any device. Collective at ZeRO 3."""


class ByLength:
    """Passes over pairs of similar length, laid out one below the other."""

    def __init__(
        self, model: LogProbModel, pairs: Sequence[TokenizedPair], pad_id: int, pairs_per_device: int
    ) -> None:
        self._model, self._pairs, self._pad_id = model, pairs, pad_id
        self.members = batches_by_length(pairs, pairs_per_device)

    def places(self, number: int) -> list[tuple[bytes, bytes]]:
        return place_keys("padded", self._of(number))

    def z(self, number: int) -> Tensor:
        batch = collate(self._of(number), self._pad_id).to(self._model.device)
        return self._model.logprobs_without_grad(batch).view(2, -1)

    def _of(self, number: int) -> list[TokenizedPair]:
        return [self._pairs[idx] for idx in self.members[number]]


def known_of(passes: Passes, parts: Parts | None) -> dict[int, tuple[float, float]]:
    """z_w and z_l of the members that rank 0's parts have, on every rank. Collective."""
    known = {} if parts is None else parts.read()
    found: dict[int, tuple[float, float]] = {}
    for number, members in enumerate(passes.members if known else ()):
        for idx, (chosen, rejected) in zip(members, passes.places(number), strict=True):
            if chosen in known and rejected in known:
                found[idx] = known[chosen], known[rejected]
    of_rank_zero: dict[int, tuple[float, float]] = from_rank_zero(found)
    return of_rank_zero


def run_passes(
    passes: Passes,
    keys: Sequence[tuple[bytes, bytes]],
    known: Mapping[int, tuple[float, float]],
    parts: Parts | None,
    on_batch: Callable[[int], None],
) -> SideLogProbs:
    """z of all members of `passes`, whose `keys` the cache has: `known`, or computed and kept in rank 0's
    `parts`. `on_batch` is called with how many more pairs are done. Collective."""
    found = dict(known)
    numbers = [number for number, members in enumerate(passes.members) if not found.keys() >= set(members)]
    fresh: dict[int, Tensor] = {}
    num_rounds, first, kept = 1, 0, time.monotonic()
    while first < len(numbers):
        last = min(len(numbers), first + num_rounds * world_size())
        for start in range(first, last, world_size()):
            mine = start + rank()
            z = passes.z(numbers[min(mine, len(numbers) - 1)])
            if mine < len(numbers):
                fresh[numbers[mine]] = z
            on_batch(sum(len(passes.members[each]) for each in numbers[start : start + world_size()]))
        first = last
        # Rank 0's clock decides for all ranks; telling them takes a wait, so it is asked seldom.
        is_time, num_rounds = from_rank_zero(_due(time.monotonic() - kept, num_rounds))
        if is_time or first == len(numbers):
            of_all = _of_all_ranks(passes, fresh)
            found |= of_all
            fresh = {}
            if parts is not None and is_time and first < len(numbers):
                parts.add(_rows(passes, keys, of_all))
            kept = time.monotonic()
    z = torch.tensor([found[idx] for idx in range(len(keys))], dtype=torch.float32).view(-1, 2)
    return SideLogProbs(*z.T.contiguous())


def _due(seconds: float, num_rounds: int) -> tuple[bool, int]:
    """Whether a part is due so long after the last one, and how many rounds are to pass until that is asked
    again: an eighth of the time or so."""
    return seconds >= SECONDS, 2 * num_rounds if seconds < SECONDS / 8 else num_rounds


def _of_all_ranks(passes: Passes, fresh: Mapping[int, Tensor]) -> dict[int, tuple[float, float]]:
    """z by member, of what each rank has computed, by pass. Collective."""
    mine: dict[int, tuple[float, float]] = {}
    for number, z in fresh.items():
        mine |= dict(zip(passes.members[number], map(tuple, z.cpu().T.tolist()), strict=True))
    found: dict[int, tuple[float, float]] = {}
    for others in gather(mine):
        found |= others
    return found


def _rows(
    passes: Passes, keys: Sequence[tuple[bytes, bytes]], of_all: Mapping[int, tuple[float, float]]
) -> list[Row]:
    """Of a part."""
    rows = []
    for number, members in enumerate(passes.members):
        if not any(idx in of_all for idx in members):
            continue
        for idx, places in zip(members, passes.places(number), strict=True):
            if idx in of_all:
                rows += [Row(*row) for row in zip(keys[idx], places, of_all[idx], strict=True)]
    return rows
