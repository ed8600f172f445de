"""Tokenised pairs: one, and many of them as flat arrays that may lie in a mapped file.

Owns their types. Does not make them (`rcpo.data.tokenize`) or keep them (`rcpo.data.token_store`).
"""

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcpo.data.pictures import Pictures

Ids: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, eq=False, repr=False)
class TokenizedSide:
    """One response with its prompt."""

    ids: list[int] | Ids
    """As given: a list, or a view of an array that many pairs share."""
    num_prompt: int
    """Prompt tokens, at least 1; `input_ids[num_prompt:]` is the response, at least 1 token. Of `NO_SIDE`
    both are 0."""
    scored: NDArray[np.bool_] | None = None
    """Of a conversation with several answers: which tokens behind the prompt are an answer's, (num_tokens -
    num_prompt,); None: all."""

    @property
    def input_ids(self) -> list[int]:
        """Prompt, response and closing EOS; a list made on the spot where the ids are in an array."""
        return self.ids if isinstance(self.ids, list) else self.ids.tolist()

    @property
    def num_tokens(self) -> int:
        """Of prompt and response; looks at no id."""
        return len(self.ids)

    @property
    def num_scored(self) -> int:
        """|y|: tokens of the response, of all its answers."""
        return self.num_tokens - self.num_prompt if self.scored is None else int(self.scored.sum())

    @property
    def scored_at(self) -> NDArray[np.int64]:
        """(num_scored,) their places in `input_ids`, each predicted at the place before."""
        if self.scored is None:
            return np.arange(self.num_prompt, self.num_tokens, dtype=np.int64)
        return np.flatnonzero(self.scored) + self.num_prompt

    @property
    def mask(self) -> bytes:
        """For digests: nothing where all of the response is scored."""
        return b"" if self.scored is None else np.asarray(self.scored, dtype=np.bool_).tobytes()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenizedSide):
            return NotImplemented
        same_prompt = self.num_prompt == other.num_prompt
        return same_prompt and self.input_ids == other.input_ids and self.mask == other.mask

    def __hash__(self) -> int:
        return hash((self.num_prompt, *self.input_ids))

    def __repr__(self) -> str:
        mask = "" if self.scored is None else f", {self.scored!r}"
        return f"TokenizedSide({self.input_ids}, {self.num_prompt}{mask})"


NO_SIDE = TokenizedSide([], 0)
"""Stands for the response that a single answer with a label does not have."""


@dataclass(frozen=True)
class TokenizedPair:
    """Both sides of one record; of a single answer with a label one of them, and `NO_SIDE`."""

    chosen: TokenizedSide
    rejected: TokenizedSide
    row: int
    """Row number in the source."""
    weight: float = 1.0
    """What multiplies the pair's loss, finite and >= 0."""
    scores: tuple[float, float] | None = None
    """Of a slot of a list (`rcpo.data.lists`): of its two responses, 0 where one is missing; None: a pair."""
    pictures: Pictures | None = None
    """What the prompt shows, which both sides see."""
    gold: TokenizedSide | None = None
    """The gold response with the same prompt; None where the objective reads none."""
    spread: tuple[float, ...] | None = None
    """Of each response of the pair, or of the list that this is a slot of, its own weight over `weight`; None
    where `weight` is all that counts."""

    @property
    def sides(self) -> tuple[TokenizedSide, ...]:
        """Those that are there, the chosen one first."""
        return tuple(side for side in (self.chosen, self.rejected) if side.num_tokens)

    @property
    def prompt_ids(self) -> list[int]:
        side = self.sides[0]
        return side.input_ids[: side.num_prompt]


class PairArrays(NamedTuple):
    """n pairs; column 0 is the chosen side, column 1 the rejected one."""

    ids: Ids
    """(N,) all sides' tokens."""
    starts: NDArray[np.int64]
    """(n, 2) where in `ids` a side begins."""
    lengths: NDArray[np.int64]
    """(n, 2) tokens of a side."""
    num_prompt: NDArray[np.int64]
    """(n, 2) prompt tokens of a side."""
    rows: NDArray[np.int64]
    """(n,) row numbers in the source."""
    weights: NDArray[np.float64]
    """(n,)"""
    scores: NDArray[np.float32]
    """(n, 2) of a list's responses; nan where these are pairs."""
    scored: NDArray[np.bool_]
    """(N,) which tokens behind a prompt are scored; (0,) where all of all sides are."""
    spread: NDArray[np.float64]
    """(n, K) of up to K responses their weights over the pair's, then nan; K is 0 where pairs have one
    weight."""


class PackedPairs(Sequence[TokenizedPair]):
    """Pairs as arrays; an item is a view that is made when it is asked for."""

    def __init__(
        self,
        arrays: PairArrays,
        pictures: NDArray[np.object_] | None = None,
        gold: "PackedPairs | None" = None,
    ) -> None:
        self.arrays = arrays
        self.gold = gold
        """Of n pairs their gold responses, as chosen sides; None where there are none."""
        self.pictures = pictures
        """(n,) of each pair its `Pictures` or None; None where no pair has any."""

    def __len__(self) -> int:
        return len(self.arrays.rows)

    @overload
    def __getitem__(self, where: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, where: slice) -> "PackedPairs": ...
    def __getitem__(self, where: int | slice) -> "TokenizedPair | PackedPairs":
        if isinstance(where, slice):
            return self.take(range(len(self))[where])
        of = self.arrays
        sides = [
            TokenizedSide(
                of.ids[start : start + length],
                num_prompt,
                _or_none(of.scored[start + num_prompt : start + length]),
            )
            for start, length, num_prompt in zip(
                of.starts[where].tolist(),
                of.lengths[where].tolist(),
                of.num_prompt[where].tolist(),
                strict=True,
            )
        ]
        score_w, score_l = of.scores[where].tolist()
        scores = None if math.isnan(score_w) else (score_w, score_l)
        pictures = None if self.pictures is None else self.pictures[where]
        gold = None if self.gold is None else self.gold[where].chosen
        spread = tuple(of.spread[where][~np.isnan(of.spread[where])].tolist()) or None
        return TokenizedPair(
            sides[0], sides[1], int(of.rows[where]), float(of.weights[where]), scores, pictures, gold, spread
        )

    def __iter__(self) -> Iterator[TokenizedPair]:
        return (self[idx] for idx in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def take(self, indices: Sequence[int]) -> "PackedPairs":
        """The pairs at `indices`, in that order; their tokens stay where they are."""
        where = np.asarray(indices, dtype=np.int64)
        of = self.arrays
        return PackedPairs(
            PairArrays(
                of.ids,
                of.starts[where],
                of.lengths[where],
                of.num_prompt[where],
                of.rows[where],
                of.weights[where],
                of.scores[where],
                of.scored,
                of.spread[where],
            ),
            None if self.pictures is None else self.pictures[where],
            None if self.gold is None else self.gold.take(indices),
        )

    @property
    def slots(self) -> int:
        """How many of these pairs, one after the other, hold a list of responses; 1 where each is a pair."""
        rows = self.arrays.rows
        if not len(rows) or math.isnan(self.arrays.scores[0, 0]):
            return 1
        return int((rows != rows[0]).argmax()) or len(rows)

    @property
    def num_lists(self) -> int:
        """Lists of responses; of pairs their number."""
        return len(self) // self.slots

    @property
    def num_rows(self) -> int:
        """Rows of the source that these are of, each row's pairs one after the other."""
        rows = self.arrays.rows
        return len(rows) and 1 + int((rows[1:] != rows[:-1]).sum())

    @property
    def present(self) -> NDArray[np.bool_]:
        """(n, 2) which responses are there."""
        return self.arrays.lengths > 0

    @property
    def has_conversations(self) -> bool:
        """Whether a response is a conversation with several answers."""
        return len(self.arrays.scored) > 0

    @property
    def num_scored(self) -> NDArray[np.int64]:
        """(n, 2) tokens of a response, of all its answers."""
        of = self.arrays
        if not len(of.scored):
            return of.lengths - of.num_prompt
        firsts = (of.starts + of.num_prompt).reshape(-1).tolist()
        ends = (of.starts + of.lengths).reshape(-1).tolist()
        nums = [int(of.scored[first:end].sum()) for first, end in zip(firsts, ends, strict=True)]
        return np.array(nums, dtype=np.int64).reshape(-1, 2)

    @property
    def has_single_answers(self) -> bool:
        return not bool(self.present.all())

    def unpaired(self) -> "PackedPairs":
        """Every response by itself, as a pair without its other one: of each pair the chosen one first."""
        places, columns = np.nonzero(self.present)
        taken = self.take(places.tolist())
        of = taken.arrays
        kept = np.arange(2)[None] == columns[:, None]
        spread = np.where(kept, of.spread, math.nan) if of.spread.size else of.spread
        arrays = of._replace(lengths=of.lengths * kept, num_prompt=of.num_prompt * kept, spread=spread)
        return PackedPairs(arrays, taken.pictures)

    def flipped(self, which: Sequence[int]) -> "PackedPairs":
        """With chosen and rejected exchanged in the pairs at these places."""
        of, where = self.arrays, np.asarray(which, dtype=np.int64)
        columns = {}
        for name in ("starts", "lengths", "num_prompt", "spread"):
            columns[name] = getattr(of, name).copy()
            columns[name][where] = columns[name][where][:, ::-1]
        return PackedPairs(of._replace(**columns), self.pictures, self.gold)

    @property
    def num_with_images(self) -> int:
        """Pairs whose prompt shows something."""
        return 0 if self.pictures is None else sum(each is not None for each in self.pictures)

    def widths(self) -> list[int]:
        """Tokens of each pair's longer side; looks at no id."""
        widths: list[int] = self.arrays.lengths.max(axis=1, initial=0).tolist()
        return widths


def _or_none(scored: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """A side's mask, None where it has none or says nothing."""
    return None if scored.all() else scored


class SideLogProbs(NamedTuple):
    """Summed log-probs of n pairs, each (n,) fp32 on the CPU."""

    z_w: Tensor
    z_l: Tensor


def present_in_pairs(pairs: Sequence[TokenizedPair]) -> Tensor:
    """(2, n) bool on the CPU: which chosen and which rejected responses are there."""
    sides = ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    return torch.tensor([[each.num_tokens > 0 for each in side] for side in sides])


def without_missing(values: SideLogProbs, present: Tensor) -> SideLogProbs:
    """With nan in the place of responses that are not there, by `present_in_pairs`."""
    return SideLogProbs(*(z.masked_fill(~has, math.nan) for z, has in zip(values, present, strict=True)))


def pair_digest(pair: TokenizedPair) -> str:
    """Of the tokens of both sides, where the responses begin and what the prompt shows: equal where a model
    sees the same."""
    seen = "" if pair.pictures is None else pair.pictures.digest.hex()
    return _side_digest(pair.chosen) + _side_digest(pair.rejected) + seen


def _side_digest(side: TokenizedSide) -> str:
    ids = array("q", [side.num_prompt, *side.input_ids]).tobytes()
    return hashlib.blake2b(ids + side.mask, digest_size=16).hexdigest()
