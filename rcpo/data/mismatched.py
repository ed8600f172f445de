"""Mismatched pairs: the prompt of one pair with both responses of another one of the same global batch.

Owns how one is made of tokens, and how long it is. Which pairs meet is the sampler's
(`rcpo.data.sampler.PairSampler.mismatches`). Only objectives that ask for them have any
(`rcpo.objectives.loss.BatchStatistic`); they are scored without gradients and never trained on.

Tokens are put together as they are: a token that spans prompt and response stays with the response that it
was tokenised with. A response is cut from the right to what its new prompt leaves of train.max_length.
"""

from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np

from rcpo.data.pairs import NO_SIDE, PackedPairs, TokenizedPair, TokenizedSide


class Mismatch(NamedTuple):
    """Which two training pairs meet."""

    prompt_of: int
    responses_of: int


class MismatchedPairs(Sequence[TokenizedPair]):
    """Mismatched pairs of these training pairs; an item is made when it is asked for. It has the row number
    of the pair that its prompt is of."""

    def __init__(self, pairs: PackedPairs, which: Sequence[Mismatch], max_length: int) -> None:
        self._pairs, self._which, self._max_length = pairs, which, max_length

    def __len__(self) -> int:
        return len(self._which)

    @overload
    def __getitem__(self, where: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, where: slice) -> "MismatchedPairs": ...
    def __getitem__(self, where: int | slice) -> "TokenizedPair | MismatchedPairs":
        if isinstance(where, slice):
            return MismatchedPairs(self._pairs, self._which[where], self._max_length)
        prompts, responses = (self._pairs[idx] for idx in self._which[where])
        only = prompts.sides[0]
        return TokenizedPair(
            self._joined(prompts.chosen if prompts.chosen.num_tokens else only, responses.chosen),
            self._joined(prompts.rejected if prompts.rejected.num_tokens else only, responses.rejected),
            prompts.row,
            pictures=prompts.pictures,
        )

    def _joined(self, prompt: TokenizedSide, response: TokenizedSide) -> TokenizedSide:
        if not response.num_tokens:
            return NO_SIDE
        parts = prompt.ids[: prompt.num_prompt], response.ids[response.num_prompt :]
        ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
        return TokenizedSide(ids[: self._max_length], prompt.num_prompt)

    def widths(self) -> list[int]:
        """Tokens of each one's longer side; looks at no id."""
        of = self._pairs.arrays
        which = np.asarray(self._which, dtype=np.int64).reshape(-1, 2)
        longest = of.num_prompt.max(axis=1, initial=0, keepdims=True)
        prompts = np.where(of.lengths > 0, of.num_prompt, longest)[which[:, 0]]
        lengths = (prompts + (of.lengths - of.num_prompt)[which[:, 1]]) * (of.lengths > 0)[which[:, 1]]
        widths: list[int] = np.minimum(lengths.max(axis=1, initial=0), self._max_length).tolist()
        return widths


def longest_mismatched(pairs: PackedPairs, max_length: int) -> int:
    """Tokens that no mismatched pair of these pairs exceeds."""
    of = pairs.arrays
    return min(max_length, int(of.num_prompt.max()) + int((of.lengths - of.num_prompt).max()))
