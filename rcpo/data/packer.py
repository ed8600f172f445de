"""From tokenised pairs to `PackedPairs`, part by part. Used by `rcpo.data.tokenize`; reading them is
`rcpo.data.pairs`."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from rcpo.data.pairs import NO_SIDE, PackedPairs, PairArrays, TokenizedPair, TokenizedSide
from rcpo.data.pictures import Pictures


class Packer:
    """Packs pairs part by part, so that never all of them are held as lists: 4 bytes a token in place of 8
    and more."""

    def __init__(self) -> None:
        self._parts: list[PairArrays] = []
        self._pictures: list[Pictures | None] = []
        self._gold: list[TokenizedSide | None] = []

    def add(self, pairs: Sequence[TokenizedPair]) -> None:
        self._pictures += [pair.pictures for pair in pairs]
        self._gold += [pair.gold for pair in pairs]
        sides = [(pair.chosen, pair.rejected) for pair in pairs]
        lengths = np.array([[side.num_tokens for side in both] for both in sides], dtype=np.int64)
        ends = lengths.reshape(-1).cumsum()
        ids = [np.asarray(side.ids, dtype=np.int32) for both in sides for side in both]
        has_masks = any(side.scored is not None for both in sides for side in both)
        self._parts.append(
            PairArrays(
                ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
                starts=(ends - lengths.reshape(-1)).reshape(-1, 2),
                lengths=lengths.reshape(-1, 2),
                num_prompt=np.array(
                    [[side.num_prompt for side in both] for both in sides], dtype=np.int64
                ).reshape(-1, 2),
                rows=np.array([pair.row for pair in pairs], dtype=np.int64),
                weights=np.array([pair.weight for pair in pairs], dtype=np.float64),
                scores=np.array(
                    [pair.scores or (math.nan, math.nan) for pair in pairs], dtype=np.float32
                ).reshape(-1, 2),
                scored=np.concatenate([_whole_mask(side) for both in sides for side in both])
                if has_masks
                else np.zeros(0, np.bool_),
                spread=_as_columns([pair.spread or () for pair in pairs]),
            )
        )

    def packed(self) -> PackedPairs:
        """All pairs that were added, in that order."""
        if not self._parts:
            self.add([])
        if any(len(part.scored) for part in self._parts):
            self._parts = [_with_mask(part) for part in self._parts]
        width = max(part.spread.shape[1] for part in self._parts)
        self._parts = [part._replace(spread=_widened(part.spread, width)) for part in self._parts]
        firsts = np.cumsum([0, *(len(part.ids) for part in self._parts[:-1])])
        moved = [
            part._replace(starts=part.starts + first) for part, first in zip(self._parts, firsts, strict=True)
        ]
        pictures = None
        if any(self._pictures):
            pictures = np.empty(len(self._pictures), dtype=np.object_)
            pictures[:] = self._pictures
        arrays = PairArrays(*(np.concatenate(columns) for columns in zip(*moved, strict=True)))
        gold = None
        if any(self._gold):
            gold = pack(TokenizedPair(side or NO_SIDE, NO_SIDE, 0) for side in self._gold)
        return PackedPairs(arrays, pictures, gold)


def _whole_mask(side: TokenizedSide) -> NDArray[np.bool_]:
    """(num_tokens,) of prompt and response."""
    mask = np.ones(side.num_tokens, np.bool_)
    if side.scored is not None:
        mask[side.num_prompt :] = side.scored
    return mask


def _with_mask(part: PairArrays) -> PairArrays:
    """Beside parts that have one."""
    return part if len(part.scored) else part._replace(scored=np.ones(len(part.ids), np.bool_))


def _as_columns(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """(n, K) of rows of up to K numbers, nan behind them."""
    columns = np.full((len(rows), max(map(len, rows), default=0)), math.nan)
    for number, row in enumerate(rows):
        columns[number, : len(row)] = row
    return columns


def _widened(columns: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """(n, width) with nan behind what is there."""
    return np.pad(columns, ((0, 0), (0, width - columns.shape[1])), constant_values=math.nan)


def pack(pairs: Iterable[TokenizedPair]) -> PackedPairs:
    """These pairs as arrays."""
    packer = Packer()
    packer.add(list(pairs))
    return packer.packed()
