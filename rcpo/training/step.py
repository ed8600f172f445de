"""One optimizer step of the method: the file to read first.

    z           = log pi(y|x) of both sides                  models.policy, attached to the graph
    loss        = weight * objective(z, ref, |y|)            objectives, on detached leaves
    d_w, d_l    = -dL/dz_w, +dL/dz_l                         method.incentives, by autograd
    aggregate   = the mean over the batch, or KL-DRO         training.aggregate, scales loss and incentives
    surrogate   = mean(-alpha d_w z_w + (d_l/alpha) z_l)     its gradient is the loss's, calibrated
    guard       every loss, z and gradient is finite         or nothing is updated: NonFiniteStepError
    geometry    = products of the sides' score vectors       training.measurement, where this step is measured
    calibrator  sees the global batch once, after the step   method.calibrators: alpha of the next step
    objective   its batch statistics advance likewise        kto's z0, bco's d, ...: the next step's numbers

With alpha = 1 the surrogate's gradient is the loss's own, -d_w grad z_w + d_l grad z_l. There is no branch on
the objective's name, and none on the kind of calibration or of aggregate. Called by `rcpo.training.loop`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rcpo.data.batch import PairBatch
from rcpo.method.calibrators import StepStatistics
from rcpo.method.metrics import QUANTITIES, pair_sums, step_row
from rcpo.method.scores import ScoreGeometry
from rcpo.models.engine import Engine
from rcpo.objectives import Objective
from rcpo.ranks.distributed import sum_over_ranks
from rcpo.training.state import TrainState
from rcpo.training.surrogate import MicroBatch, Price, Priced


@dataclass(frozen=True)
class Measured:
    """Score geometry of one optimizer step's global batch."""

    geometry: ScoreGeometry | None = None
    """None where the step was not measured."""
    population: dict[str, ScoreGeometry] = field(default_factory=dict)
    """"population" and, in Adam's metric, "adam": from products with the measurement before."""


class NonFiniteStepError(Exception):
    """Numbers of this step are not finite: the gradient is still there, no weight and no state has changed.
    Raised on every rank."""

    def __init__(self, row: dict[str, float], lost: list[int]) -> None:
        super().__init__(f"micro-batches {lost} of this rank")
        self.row = row
        """The step's metrics row, as far as it goes."""
        self.lost = lost
        """Which of this rank's micro-batches hold such numbers; empty where all are on other ranks."""


class TrainedStep(NamedTuple):
    row: dict[str, float]
    """The metrics row, the same on every rank."""
    stop: bool
    """Whether a rank was asked to stop."""


class Measurement(Protocol):
    """How a step's backward passes are run, and what is read off them; `rcpo.training.measurement` has the
    kinds."""

    takes_joint_layouts: bool
    """Whether both sides go through the model together, so that they may share rows (`rcpo.data.joint`)."""

    def begin(self, alpha: float) -> None:
        """Start an optimizer step that is calibrated with `alpha`."""

    def backward(self, engine: Engine, batch: PairBatch, price: Price, alpha: float) -> Priced:
        """Forward and backward of one micro-batch. Collective at ZeRO 3."""

    def partials(self, engine: Engine) -> Tensor:
        """This rank's share of what `read` wants, to be summed over ranks: fp64, on the device.
        Collective."""

    def read(self, totals: list[float]) -> Measured:
        """The geometry from the sums over ranks."""


class Aggregate(Protocol):
    """From the pairs' losses to the loss of the global batch; `rcpo.training.aggregate` has the kinds."""

    def prices(
        self, engine: Engine, objective: Objective, state: tuple[float, ...], batches: Sequence[MicroBatch]
    ) -> Iterator[tuple[MicroBatch, Price]]:
        """Each of this rank's micro-batches of one global batch with its price, in turn: loss and incentives
        whose means over the global batch are the loss and its derivatives. Collective."""


def train_step(
    engine: Engine,
    objective: Objective,
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    pairs_per_step: int,
    measurement: Measurement,
    aggregate: Aggregate,
    probe_r_w: float | None = None,
    asked_to_stop: bool = False,
) -> TrainedStep:
    """Train on this rank's micro-batches of one global batch.

    `measurement` says how the step is run and what geometry is read off it, `aggregate` what the pairs'
    losses add up to; `probe_r_w` is the displacement of the held-out probe pairs, where the calibrator asked
    for it. `state` advances by one step. The only wait for the device is the one reduction of the metrics; it
    comes before the update, so that numbers that are not finite never reach the weights.

    Raises NonFiniteStepError on every rank in that case, with `state` as it was.
    """
    alpha = state.calibrator.alpha()
    measurement.begin(alpha)
    sums = torch.zeros(len(QUANTITIES) + objective.num_statistics, dtype=torch.float64, device=engine.device)
    finite = []
    for micro_batch, price_of in aggregate.prices(engine, objective, state.objective_state, micro_batches):
        priced = measurement.backward(engine, micro_batch.batch, price_of, alpha)
        engine.end_micro_batch()
        columns = objective.statistic_columns(priced.pair).double().sum(1)
        sums += torch.cat([pair_sums(priced.loss, priced.pair, priced.incentives), columns])
        finite.append(is_finite(priced, engine.largest_gradient()))

    lost = ~torch.stack(finite)
    votes = torch.stack([lost.any(), lost.new_tensor(asked_to_stop)]).double()
    totals = sum_over_ranks(torch.cat([votes, sums, measurement.partials(engine)])).tolist()
    (num_lost, num_asked), totals = totals[:2], totals[2:]
    means = [total / pairs_per_step for total in totals[: len(sums)]]
    quantities = dict(zip(QUANTITIES, means, strict=False))
    measured = measurement.read(totals[len(sums) :])
    statistics = StepStatistics(
        mean_d_w=quantities["incentive/chosen"],
        mean_d_l=quantities["incentive/rejected"],
        geometry=measured.geometry,
        mean_r_w=quantities["displacement/chosen"],
        probe_r_w=probe_r_w,
    )
    row = step_row(quantities, statistics, alpha, state.calibrator, measured.population)
    if num_lost:
        raise NonFiniteStepError(row, lost.nonzero().flatten().tolist())
    engine.step()
    state.calibrator.update(statistics)
    state.objective_state = objective.advance(state.objective_state, means[len(QUANTITIES) :])
    state.step += 1
    return TrainedStep(row | state.calibrator.counts(), num_asked > 0)


def is_finite(priced: Priced, largest_gradient: Tensor) -> Tensor:
    """Whether every loss, log-probability, incentive and gradient entry of a micro-batch is: bool scalar on
    the device."""
    values = torch.cat([priced.loss, priced.pair.z_w, priced.pair.z_l, *priced.incentives])
    return values.isfinite().all() & largest_gradient.isfinite()
