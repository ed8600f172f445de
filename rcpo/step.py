"""One optimizer step of the method: the file to read first.

    z           = log pi(y|x) of both sides                      rcpo.model, attached to the graph
    loss        = objective(z, ref, |y|)                         rcpo.objectives, on detached leaves
    d_w, d_l    = -dL/dz_w, +dL/dz_l                             rcpo.incentives, by autograd
    surrogate   = mean(-alpha d_w z_w + (d_l/alpha) z_l)         its gradient is the calibrated gradient of
    the loss s_w, s_l    = grad of mean z_w, z_l                          rcpo.scores, filled by the head's
    own backward calibrator  sees the global batch once, after the step       rcpo.calibration: alpha of the
    next step objective   its batch statistics advance likewise            kto's z0, bco's d, ...: numbers of
    the next step

With alpha = 1 the surrogate's gradient is the loss's own, -d_w grad z_w + d_l grad z_l. There is no branch on
the objective's name and none on the kind of calibration. Called by `rcpo.trainer`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcpo.calibration import Calibrator, StepStatistics
from rcpo.data.batch import PairBatch
from rcpo.distributed import sum_over_ranks
from rcpo.engine import Engine
from rcpo.incentives import loss_and_incentives
from rcpo.metrics import QUANTITIES, pair_sums, step_row
from rcpo.objectives import Objective, PairLogProbs
from rcpo.scores import HeadScores, geometry_of_mean


class MicroBatch(NamedTuple):
    """Pairs on the device with their reference log-probs (B,) fp32."""

    batch: PairBatch
    ref_w: Tensor
    ref_l: Tensor


@dataclass
class TrainState:
    """What the method carries from step to step. With the engine it is all that a restart needs: data order
    and reference are functions of the config."""

    step: int
    """Optimizer steps done."""
    calibrator: Calibrator
    objective_state: tuple[float, ...]
    """The objective's batch statistics of the step before."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "calibrator": self.calibrator.state_dict(),
            "objective_state": list(self.objective_state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.calibrator.load_state_dict(state["calibrator"])
        self.objective_state = tuple(state["objective_state"])


def train_step(
    engine: Engine,
    objective: Objective,
    state: TrainState,
    micro_batches: Iterable[MicroBatch],
    pairs_per_step: int,
    scores: HeadScores | None,
) -> dict[str, float]:
    """Train on this rank's micro-batches of one global batch; returns the metrics row, the same on every
    rank.

    `scores` is where geometry is measured in this step, or None. `state` advances by one step. The only wait
    for the device is the one reduction of the metrics, after the weights have been updated.
    """
    alpha = state.calibrator.alpha()
    engine.policy.head.scores = scores
    sums = torch.zeros(len(QUANTITIES) + objective.num_statistics, dtype=torch.float64, device=engine.device)
    for batch, ref_w, ref_l in micro_batches:
        z_w, z_l = engine.logprobs(batch).chunk(2)
        len_w, len_l = batch.lengths.to(z_w.dtype).chunk(2)
        pair = PairLogProbs(z_w.detach(), z_l.detach(), ref_w, ref_l, len_w, len_l, state.objective_state)
        loss, incentives = loss_and_incentives(objective, pair)
        surrogate = (-alpha * incentives.d_w * z_w + incentives.d_l / alpha * z_l).mean()
        engine.backward(surrogate)
        engine.step()
        sums += torch.cat(
            [pair_sums(loss, pair, incentives), objective.statistic_columns(pair).double().sum(1)]
        )
    engine.policy.head.scores = None

    squares = sums.new_zeros(0) if scores is None else scores.partial_squares()
    totals = sum_over_ranks(torch.cat([sums, squares])).tolist()
    means = [total / pairs_per_step for total in totals[: len(sums)]]
    quantities = dict(zip(QUANTITIES, means, strict=False))
    statistics = StepStatistics(
        mean_d_w=quantities["incentive/chosen"],
        mean_d_l=quantities["incentive/rejected"],
        geometry=None if scores is None else geometry_of_mean(totals[len(sums) :], pairs_per_step),
    )
    row = step_row(quantities, statistics, alpha, state.calibrator)
    state.calibrator.update(statistics)
    state.objective_state = objective.advance(state.objective_state, means[len(QUANTITIES) :])
    state.step += 1
    return row | state.calibrator.counts()
