"""Geometry of every micro-batch by itself, on this rank alone, before it goes backward: for a calibrator that
gives each an alpha of its own.

    EachByHead      scope head: the forward pass itself, while the head holds a chunk's softmax. Cost: one
                    more product with the vocabulary and a copy of a chunk, in every micro-batch.
    EachByAdapters  scope lora_last: autograd of both sides' mean z by the last block's adapters, on the graph
                    of the micro-batch. Cost: two passes back through head and last block, whose logits are
                    made twice again, in every micro-batch. Not at ZeRO 3, which wants every backward pass
                    right after its own forward pass.

Both wait for the device twice a micro-batch. Where the whole step's geometry is due too
(metrics.geometry_every), the micro-batches' vectors are summed, and reduced over the ranks as ever.
`rcpo.training.measurements` makes them.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rcpo.data.batch import PairBatch
from rcpo.engine.engine import Engine
from rcpo.method.scores import HeadScores, ScoreGeometry, Sides
from rcpo.models.logprobs import score_shares
from rcpo.ranks.distributed import reduce_scatter, world_size
from rcpo.training.measurement import Measurement
from rcpo.training.reader import Measured, Reader


class EachMicroBatch(Measurement):
    """What both kinds share; they say where a micro-batch's two vectors come from."""

    def __init__(self, reader: Reader, num_pairs: int) -> None:
        self._reader, self._num_pairs = reader, num_pairs
        self._is_due = False
        self._totals: list[Tensor] = []

    def at(self, is_due: bool) -> "EachMicroBatch":
        """Itself, for a step whose whole geometry is due or not."""
        self._is_due = is_due
        return self

    def begin(self) -> None:
        self._totals = []

    @abstractmethod
    def vectors(self, batch: PairBatch) -> list[Tensor]:
        """Gradients of the sums over the micro-batch of both sides' z, or z/|y|: the first dimension is a
        multiple of the ranks. The next micro-batch may change them."""

    def of_micro_batch(self, batch: PairBatch) -> ScoreGeometry:
        chosen, rejected = self.vectors(batch)
        scale = 1 / batch.num_pairs
        products = Sides([chosen], [rejected], scale, scale).partial_products().tolist()
        if self._is_due and self._totals:
            for total, side in zip(self._totals, (chosen, rejected), strict=True):
                total += side
        elif self._is_due:
            self._totals = [chosen.clone(), rejected.clone()]
        return ScoreGeometry(*products)

    def products(self, engine: Engine, alpha: float) -> Tensor:
        if not self._is_due:
            return super().products(engine, alpha)
        chosen, rejected = (reduce_scatter(side) for side in self._totals)
        sides = Sides([chosen], [rejected], 1 / self._num_pairs, 1 / self._num_pairs)
        return self._reader.products(sides, None)

    def read(self, products: list[float]) -> Measured:
        return self._reader.read(products) if self._is_due else Measured()

    def keep(self) -> None:
        self._reader.keep()


class EachByHead(EachMicroBatch):
    """Of the output projection."""

    def __init__(self, engine: Engine, reader: Reader, num_pairs: int, averages: bool) -> None:
        super().__init__(reader, num_pairs)
        has_bias = engine.policy.head.bias is not None
        self._scores = HeadScores(
            engine.vocabulary,
            engine.hidden_size,
            has_bias,
            engine.device,
            averages=averages,
            in_forward=True,
        )

    @contextmanager
    def watching(self, engine: Engine) -> Iterator[None]:
        self._scores.reset()
        engine.policy.head.scores = self._scores
        try:
            yield
        finally:
            engine.policy.head.scores = None

    def vectors(self, batch: PairBatch) -> list[Tensor]:
        return self._scores.own_sums()


class EachByAdapters(EachMicroBatch):
    """Of the last block's adapters. Goes back from the head's own output, because DeepSpeed takes a pass back
    from the engine's for the step's."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], reader: Reader, num_pairs: int, averages: bool
    ) -> None:
        super().__init__(reader, num_pairs)
        self._parameters, self._averages = list(parameters), averages
        self._made = torch.empty(0)

    @contextmanager
    def watching(self, engine: Engine) -> Iterator[None]:
        handle = engine.policy.head.register_forward_hook(self._note)
        try:
            yield
        finally:
            handle.remove()
            self._made = torch.empty(0)

    def _note(self, head: nn.Module, inputs: tuple[Any, ...], made: Tensor) -> None:
        self._made = made

    def vectors(self, batch: PairBatch) -> list[Tensor]:
        shares = score_shares(batch, None, self._averages)
        if shares is None:
            shares = torch.ones_like(self._made)
        is_chosen = torch.arange(len(shares), device=shares.device) < batch.num_chosen_tokens
        return [self._gradient(shares * is_chosen), self._gradient(shares * ~is_chosen)]

    def _gradient(self, shares: Tensor) -> Tensor:
        parts = torch.autograd.grad(self._made, self._parameters, shares, retain_graph=True)
        flat = torch.cat([part.flatten().float() for part in parts])
        return nn.functional.pad(flat, (0, -len(flat) % world_size()))
