"""One optimizer step of the method: the file to read first.

    z           = log pi(y|x) of both sides                  rcpo.model, attached to the graph
    loss        = weight * objective(z, ref, |y|)            rcpo.objectives, on detached leaves
    d_w, d_l    = -dL/dz_w, +dL/dz_l                         rcpo.incentives, by autograd
    aggregate   = the mean over the batch, or KL-DRO         rcpo.aggregate, scales loss and incentives
    surrogate   = mean(-alpha d_w z_w + (d_l/alpha) z_l)     its gradient is the loss's, calibrated
    guard       every loss, z and gradient is finite         or nothing is updated: NonFiniteStepError
    geometry    = products of the sides' score vectors       rcpo.measurement, where this step is measured
    calibrator  sees the global batch once, after the step   rcpo.calibration: alpha of the next step
    objective   its batch statistics advance likewise        kto's z0, bco's d, ...: the next step's numbers

With alpha = 1 the surrogate's gradient is the loss's own, -d_w grad z_w + d_l grad z_l. There is no branch on
the objective's name, and none on the kind of calibration or of aggregate. Called by `rcpo.trainer`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rcpo.calibration import Calibrator, StepStatistics
from rcpo.data.batch import PairBatch
from rcpo.distributed import sum_over_ranks
from rcpo.engine import Engine
from rcpo.incentives import Incentives, loss_and_incentives
from rcpo.metrics import QUANTITIES, pair_sums, step_row
from rcpo.objectives import Objective, PairLogProbs
from rcpo.scores import ScoreGeometry


class MicroBatch(NamedTuple):
    """Pairs on the device with their reference log-probs and weights (B,) fp32."""

    batch: PairBatch
    ref_w: Tensor
    ref_l: Tensor
    weight: Tensor
    """What multiplies a pair's loss; 1 where a run has no sample weights."""


class Priced(NamedTuple):
    """A micro-batch after the objective has seen it; every tensor (B,), detached."""

    pair: PairLogProbs
    loss: Tensor
    incentives: Incentives


Price = Callable[[Tensor, Tensor], Priced]
"""From detached z_w, z_l (B,) to loss and incentives."""


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
    """How a step's backward passes are run, and what is read off them; `rcpo.measurement` has the kinds."""

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
    """From the pairs' losses to the loss of the global batch; `rcpo.aggregate` has the kinds."""

    def prices(
        self, engine: Engine, objective: Objective, state: tuple[float, ...], batches: Sequence[MicroBatch]
    ) -> Iterator[tuple[MicroBatch, Price]]:
        """Each of this rank's micro-batches of one global batch with its price, in turn: loss and incentives
        whose means over the global batch are the loss and its derivatives. Collective."""


@dataclass
class TrainState:
    """What the method carries from step to step. With the engine it is all that a restart needs: data order
    and reference are functions of the config."""

    step: int
    """Optimizer steps done."""
    calibrator: Calibrator
    objective_state: tuple[float, ...]
    """The objective's batch statistics of the step before."""
    num_nonfinite_steps: int = 0
    """Steps skipped because their numbers were not finite."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "calibrator": self.calibrator.state_dict(),
            "objective_state": list(self.objective_state),
            "num_nonfinite_steps": self.num_nonfinite_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.calibrator.load_state_dict(state["calibrator"])
        self.objective_state = tuple(state["objective_state"])
        self.num_nonfinite_steps = state["num_nonfinite_steps"]


def price(
    objective: Objective, state: tuple[float, ...], micro_batch: MicroBatch, z_w: Tensor, z_l: Tensor
) -> Priced:
    """Weighted loss and incentives of a micro-batch's pairs at detached z_w, z_l (B,) fp32."""
    len_w, len_l = micro_batch.batch.lengths.to(z_w.dtype).chunk(2)
    pair = PairLogProbs(z_w, z_l, micro_batch.ref_w, micro_batch.ref_l, len_w, len_l, state)
    loss, (d_w, d_l) = loss_and_incentives(objective, pair)
    weight = micro_batch.weight
    return Priced(pair, weight * loss, Incentives(weight * d_w, weight * d_l))


def surrogate_sides(priced: Priced, alpha: float) -> tuple[Tensor, Tensor]:
    """Coefficients of z_w and z_l in the surrogate: -alpha d_w and d_l / alpha, each (B,)."""
    return -alpha * priced.incentives.d_w, priced.incentives.d_l / alpha


def joint_backward(
    engine: Engine, batch: PairBatch, price: Price, alpha: float, is_last: bool = True
) -> Priced:
    """The ordinary micro-batch: both sides forward together, and back."""
    z_w, z_l = engine.logprobs(batch).chunk(2)
    priced = price(z_w.detach(), z_l.detach())
    surrogate_w, surrogate_l = surrogate_sides(priced, alpha)
    engine.backward((surrogate_w * z_w + surrogate_l * z_l).mean(), is_last)
    return priced


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
