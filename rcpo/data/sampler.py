"""Which pairs an optimizer step trains on: a pure function of seed and step, so that a resumed run needs no
state.

The stream is one shuffled pass over the pairs after another. Nothing is dropped: where a pass does not divide
by the global batch, a batch takes the end of one pass and the start of the next. Lists of responses are drawn
whole (`rcpo.data.lists`): what is said of pairs here is true of lists, and indices are those of their slots.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from rcpo.data.mismatched import Mismatch

Item = TypeVar("Item")


def dealt(
    items: Sequence[Item], widths: Sequence[int] | None, rank: int, world_size: int, per_device: int
) -> Iterator[list[Item]]:
    """A rank's micro-batches of `items`: sorted by width, where there are widths, and ranks take turns, so
    that little is padded and all ranks have about as much to do. What a step adds up does not depend on
    it."""
    order = list(range(len(items)))
    if widths is not None:
        order.sort(key=widths.__getitem__)
    for start in range(rank * per_device, len(order), world_size * per_device):
        yield [items[place] for place in order[start : start + per_device]]


class PairSampler:
    """Global batches of pair indices; the same on every rank."""

    def __init__(
        self,
        num_pairs: int,
        pairs_per_step: int,
        seed: int,
        widths: Sequence[int] | None = None,
        slots: int = 1,
    ) -> None:
        """`num_pairs` training pairs, at least 1, in batches of `pairs_per_step`; `seed` fixes every pass's
        order. `widths` are the pairs' lengths in tokens: with them, micro-batches hold pairs of similar
        length. `slots` are those of a list: with more than 1 `num_pairs` and `pairs_per_step` count lists,
        and `widths` has one of each."""
        self._num_pairs, self._pairs_per_step, self._seed = num_pairs, pairs_per_step, seed
        self._widths, self._slots = widths, slots
        self._passes: dict[int, list[int]] = {}

    @property
    def num_fresh_steps(self) -> int:
        """Optimizer steps whose pairs are all new to the run: those of the first pass, less one that
        straddles it."""
        return self._num_pairs // self._pairs_per_step

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps that show at least `epochs` passes' worth of pairs."""
        return max(1, math.ceil(epochs * self._num_pairs / self._pairs_per_step - 1e-9))

    def global_batch(self, step: int) -> list[int]:
        """Indices of optimizer step `step`, counted from 0, in training order."""
        return self._slots_of(self._drawn(step))

    def _drawn(self, step: int) -> list[int]:
        start = step * self._pairs_per_step
        return [self._at(position) for position in range(start, start + self._pairs_per_step)]

    def _slots_of(self, drawn: Sequence[int]) -> list[int]:
        slots = self._slots
        return [slot for idx in drawn for slot in range(idx * slots, (idx + 1) * slots)]

    def micro_batches(
        self, step: int, rank: int, world_size: int, pairs_per_device: int
    ) -> Iterator[list[int]]:
        """This rank's micro-batches of the global batch, as `dealt` says."""
        batch = self._drawn(step)
        widths = None if self._widths is None else [self._widths[idx] for idx in batch]
        yield from map(self._slots_of, dealt(batch, widths, rank, world_size, pairs_per_device))

    def mismatches(self, step: int) -> list[Mismatch]:
        """Which pairs of the global batch meet: each prompt with the responses of the pair after it in
        training order, the last one with the first one's. In a batch that takes the end of one pass and the
        start of the next a pair may stand beside itself."""
        batch = self.global_batch(step)
        return [Mismatch(*both) for both in zip(batch, batch[1:] + batch[:1], strict=True)]

    def all_mismatches(self, num_steps: int) -> list[Mismatch]:
        """Those of the first `num_steps` steps, each once."""
        return list(dict.fromkeys(each for step in range(num_steps) for each in self.mismatches(step)))

    def visited(self, num_steps: int) -> list[int]:
        """Indices that the first `num_steps` steps train on, each once, sorted."""
        if num_steps * self._pairs_per_step >= self._num_pairs:
            return list(range(self._num_pairs * self._slots))
        return sorted({idx for step in range(num_steps) for idx in self.global_batch(step)})

    def epoch(self, num_steps: int) -> float:
        """Passes over the training pairs after `num_steps` optimizer steps."""
        return num_steps * self._pairs_per_step / self._num_pairs

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self._num_pairs)
        if epoch not in self._passes:
            # Kept for this pass and the one before only: a batch may straddle them.
            self._passes = {key: order for key, order in self._passes.items() if key >= epoch - 1}
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            self._passes[epoch] = torch.randperm(self._num_pairs, generator=generator).tolist()
        return self._passes[epoch][offset]
