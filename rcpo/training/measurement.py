"""Which score vectors one optimizer step catches on its way, and what is read off them.

`rcpo.training.step` runs the passes; a measurement opens the places where gradients are caught:

    Measurement        nothing is measured: the ordinary step
    HeadMeasurement    scope head: the ordinary backward pass, whose head adds up both sides
    ApartMeasurement   the calibrator wants the two halves of the real gradient over parameters: the sides go
                       backward one after the other. At ZeRO 3 one forward pass of one side more, about a
                       sixth of a step.
    BesideMeasurement  geometry of parameters that must not touch the training (metrics.geometry_every), or of
                       unweighted scores: two backward passes beside the ordinary one, whose gradients are
                       captured and withheld from the engine. The training is bit-identical; the step takes
                       twice its time.
    EachMicroBatch     every micro-batch by itself, before it goes backward (`rcpo.training.each_micro_batch`)

`rcpo.training.measurements` says which one is due.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from rcpo.data.batch import PairBatch
from rcpo.engine.engine import Engine
from rcpo.method.incentives import Incentives
from rcpo.method.scores import (
    CHOSEN,
    REJECTED,
    HeadScores,
    ParameterScores,
    ScoreGeometry,
    Sides,
)
from rcpo.models.policy import read
from rcpo.ranks.distributed import world_size
from rcpo.training.reader import Measured, Reader


class Measurement:
    """Nothing is measured; the kinds below override what they need."""

    takes_sides_apart = False
    """Whether each side goes through the model by itself."""
    takes_joint_layouts = True
    """Whether the sides of a pair may share rows (`rcpo.data.joint`): not where one goes alone."""
    has_passes_beside = False
    """Whether `passes_beside` runs backward passes of its own."""

    def begin(self) -> None:
        """Start an optimizer step."""

    def watching(self, engine: Engine) -> AbstractContextManager[None]:
        """Open around the pass of both sides together."""
        return nullcontext()

    def catching(self, side: int) -> AbstractContextManager[None]:
        """Open around the backward pass of one side, `CHOSEN` or `REJECTED`, where the sides are apart."""
        return nullcontext()

    def of_micro_batch(self, batch: PairBatch) -> ScoreGeometry | None:
        """Geometry on this rank of the micro-batch that has just gone forward, and not yet backward; None
        where whole steps are measured."""
        return None

    def passes_beside(self, engine: Engine, batch: PairBatch, pulls: Incentives) -> None:
        """Backward passes that the engine's gradient sees nothing of; `pulls` are the incentives by z, the
        sum. Collective at ZeRO 3."""

    def products(self, engine: Engine, alpha: float) -> Tensor:
        """This rank's share of what `read` wants of a step that was calibrated with `alpha`, to be summed
        over ranks: fp64, on the device. Collective."""
        return torch.zeros(0, dtype=torch.float64, device=engine.device)

    def read(self, products: list[float]) -> Measured:
        """The geometry from the sums over ranks."""
        return Measured()

    def keep(self) -> None:
        """The step has been taken: what was read of it joins metrics.population."""


ADAM_EPS = 1e-12
"""Keeps 1/sqrt(v) finite where a parameter has had no gradient."""


class HeadMeasurement(Measurement):
    """Geometry of the output projection, from the ordinary backward pass."""

    def __init__(self, engine: Engine, reader: Reader, num_pairs: int, averages: bool) -> None:
        has_bias = engine.policy.head.bias is not None
        self._scores = HeadScores(
            engine.vocabulary, engine.hidden_size, has_bias, engine.device, reader.weighted, averages
        )
        self._reader = reader
        self._num_pairs = num_pairs

    def begin(self) -> None:
        self._scores.reset()

    @contextmanager
    def watching(self, engine: Engine) -> Iterator[None]:
        engine.policy.head.scores = self._scores
        try:
            yield
        finally:
            engine.policy.head.scores = None

    def products(self, engine: Engine, alpha: float) -> Tensor:
        if self._scores.weighted:
            scales = _calibrated_scales(alpha)
        else:
            scales = (1 / self._num_pairs, 1 / self._num_pairs)
        return self._reader.products(self._scores.sides(*scales), self._metric(engine))

    def _metric(self, engine: Engine) -> list[Tensor] | None:
        head = engine.policy.head
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        moments = engine.second_moments(parameters) if self._reader.population and parameters else None
        return None if moments is None else _inverse_roots(self._scores.shares_of(list(moments)))

    def read(self, products: list[float]) -> Measured:
        return self._reader.read(products)

    def keep(self) -> None:
        self._reader.keep()


def _calibrated_scales(alpha: float) -> tuple[float, float]:
    """What turns the sum over ranks of the calibrated surrogate's two gradients, -alpha G_w and G_l / alpha
    (the engine takes the mean over micro-batches before autograd), into G_w and G_l."""
    return -1 / (alpha * world_size()), alpha / world_size()


def _inverse_roots(moments: list[Tensor]) -> list[Tensor]:
    return [moment.sqrt().add_(ADAM_EPS).reciprocal_() for moment in moments]


class ApartMeasurement(Measurement):
    """The two halves of the real gradient over a set of parameters: the sides go backward one after the
    other."""

    takes_sides_apart = True
    takes_joint_layouts = False

    def __init__(self, scores: ParameterScores, reader: "ParameterReader") -> None:
        self._scores, self._reader = scores, reader

    def begin(self) -> None:
        self._scores.reset()

    def catching(self, side: int) -> AbstractContextManager[None]:
        return self._scores.capture(side, keep_gradient=True)

    def products(self, engine: Engine, alpha: float) -> Tensor:
        return self._reader.products(engine, self._scores.sides(*_calibrated_scales(alpha)))

    def read(self, products: list[float]) -> Measured:
        return self._reader.read(products)

    def keep(self) -> None:
        self._reader.keep()


class BesideMeasurement(Measurement):
    """Geometry of a set of parameters beside an ordinary step, which it leaves as it is, bit for bit."""

    takes_joint_layouts = False
    has_passes_beside = True

    def __init__(
        self,
        scores: ParameterScores,
        reader: "ParameterReader",
        weighted: bool,
        averages: bool,
        slots: int = 1,
    ) -> None:
        self._scores, self._reader = scores, reader
        self._weighted, self._averages, self._slots = weighted, averages, slots

    def begin(self) -> None:
        self._scores.reset()

    def passes_beside(self, engine: Engine, batch: PairBatch, pulls: Incentives) -> None:
        weights: Sequence[Tensor] = pulls
        if not self._weighted:
            weights = [torch.full_like(pulls.d_w, self._slots)] * 2
            if self._averages:
                weights = (self._slots / batch.lengths.clamp(min=1).to(pulls.d_w.dtype)).chunk(2)
        for side, is_last in ((CHOSEN, False), (REJECTED, True)):
            of_side = batch.side(chosen=side == CHOSEN)
            z = read(engine.logprobs(of_side), of_side).z
            with self._scores.capture(side, keep_gradient=False):
                engine.backward((weights[side] * z).mean(), is_last)

    def products(self, engine: Engine, alpha: float) -> Tensor:
        return self._reader.products(engine, self._scores.sides(1 / world_size(), 1 / world_size()))

    def read(self, products: list[float]) -> Measured:
        return self._reader.read(products)

    def keep(self) -> None:
        self._reader.keep()


class ParameterReader:
    """`Reader` for sides over parameters; shared by both measurements, so that either follows the other."""

    def __init__(self, parameters: list[torch.nn.Parameter], scores: ParameterScores, reader: Reader) -> None:
        self._parameters, self._scores, self._reader = parameters, scores, reader

    def products(self, engine: Engine, sides: Sides) -> Tensor:
        moments = engine.second_moments(self._parameters) if self._reader.population else None
        metric = None if moments is None else _inverse_roots(self._scores.shares_of(moments))
        return self._reader.products(sides, metric)

    def read(self, products: list[float]) -> Measured:
        return self._reader.read(products)

    def keep(self) -> None:
        self._reader.keep()
