"""One optimizer step of the method: the file to read first.

    beforehand  what the whole global batch decides          training.beforehand: for most objectives nothing
    z           = log pi(y|x) of both sides                  models.policy, attached to the graph
    loss        = weight * objective(z, ref, |y|)            training.pricing: objectives, on detached leaves
    d_w, d_l    = -dL/dz_w, +dL/dz_l                         method.incentives, by autograd
    surrogate   = mean(-alpha d_w z_w + (d_l/alpha) z_l)     its gradient is the loss's, calibrated
    beside      a likelihood term of another text, a router's loss: of neither side, alpha leaves them alone
    guard       every loss, z and gradient is finite         or nothing is updated: NonFiniteStepError
    geometry    = products of the sides' score vectors       training.measurement, where this step is measured
    calibrator  sees the global batch once, after the step   method.calibrators: alpha of the next step
                or each micro-batch before it goes backward  method.published: alpha of that micro-batch
    objective   its batch statistics advance likewise        bco's d, acpo's tau: the next step's numbers

With alpha = 1 the surrogate's gradient is the loss's own, -d_w grad z_w + d_l grad z_l. With
objective.log_probs=mean the objective reads z/|y|: d and the scores are those of z/|y|. There is no branch on
the objective's name, and none on the kind of calibration. The door in is `train_step`, called by
`rcpo.training.loop`; the door out is the `TrainedStep` that it returns.

Shape legend: B pairs of a micro-batch.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from rcpo.engine.gradient_norm import whole_norm
from rcpo.method.incentives import Incentives
from rcpo.method.metrics import QUANTITIES, balance_row, means_of, pair_sums, statistics_of, step_row
from rcpo.method.scores import CHOSEN, REJECTED
from rcpo.method.statistics import Probe
from rcpo.models.policy import Read, read
from rcpo.ranks.distributed import sum_parts_over_ranks, world_size
from rcpo.training.beforehand import (
    tilted,
    with_expert_costs,
    with_lengths,
    with_mean_tokens,
    with_mismatched,
    with_partners,
    with_sides_by_sign,
)
from rcpo.training.measurement import Measurement
from rcpo.training.micro_batch import MicroBatch
from rcpo.training.pricing import Priced, joined, priced_pass
from rcpo.training.state import Method, TrainState


class Sums(NamedTuple):
    """Of this rank's pairs of a step, on the device."""

    quantities: Tensor
    """(len(QUANTITIES),) fp64."""
    statistics: Tensor
    """(num_statistics,) fp64: the objective's columns."""
    lost: Tensor
    """Bool, for each micro-batch: whether a loss, a z or an incentive in it is not finite."""


class TrainedStep(NamedTuple):
    row: dict[str, float]
    """The metrics row, the same on every rank."""
    stop: bool
    """Whether a rank was asked to stop."""


class NonFiniteStepError(Exception):
    """Numbers of this step are not finite: the gradient is still there, no weight and no state has changed.
    Raised on every rank."""

    def __init__(self, row: dict[str, float], lost: list[int]) -> None:
        super().__init__(f"micro-batches {lost} of this rank")
        self.row = row
        """The step's metrics row, as far as it goes."""
        self.lost = lost
        """Which of this rank's micro-batches hold such numbers; empty where all are on other ranks."""


def train_step(
    method: Method,
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    measurement: Measurement,
    probe: Probe | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    mismatched: Sequence[MicroBatch] = (),
) -> TrainedStep:
    """Train on this rank's micro-batches of one global batch.

    `measurement` says which score vectors are caught on the way; `probe` is the displacement of the
    held-out probe pairs, where the calibrator asked for it; `mismatched` are this rank's mismatched pairs,
    where the objective needs them. `asked_to_stop` is asked as late as the ranks can still hear of it in this
    step. `state` advances by one step. The only wait for the device is the one reduction over the ranks (two
    with mismatched pairs); it comes before the update, so that numbers that are not finite never reach the
    weights.

    Raises NonFiniteStepError on every rank in that case, with `state` as it was.
    """
    engine, objective, num_pairs = method.engine, method.objective, method.pairs_per_step
    alpha = state.calibrator.alpha()
    state.calibrator.begin()
    measurement.begin()
    seeing = with_lengths(method, with_mismatched(method, state, mismatched), micro_batches)
    micro_batches = with_sides_by_sign(method, seeing, micro_batches)
    micro_batches = with_partners(method, with_mean_tokens(method, micro_batches))
    micro_batches = tilted(method, seeing, micro_batches)
    router_loss, micro_batches = with_expert_costs(method, micro_batches)
    sums = forward_and_back(method, seeing, micro_batches, measurement)

    of_rank = state.calibrator.of_rank(world_size())
    totals = sum_parts_over_ranks(
        engine.device,
        lost=sums.lost.any(),
        asked_to_stop=[float(asked_to_stop())],
        quantities=sums.quantities,
        statistics=sums.statistics,
        present=_num_present(micro_batches),
        of_ranks=list(of_rank.values()),
        gradient_norms=engine.gradient_norms(),
        products=measurement.products(engine, alpha),
    )
    num_chosen, num_rejected, num_whole = totals["present"]
    means = means_of(totals["quantities"], num_pairs, num_chosen, num_rejected, num_whole, method.slots)
    measured = measurement.read(totals["products"])
    seen = statistics_of(means, measured.geometry, probe, engine.lr_share())
    of_ranks = dict(zip(of_rank, totals["of_ranks"], strict=True))
    alpha = of_ranks.get("calibration/alpha", alpha)
    row = step_row(means, seen, alpha, state.calibrator, measured.population) | of_ranks
    row |= balance_row(num_pairs, num_chosen, num_rejected, num_whole)
    row |= _router_row(method, row["train/loss"], router_loss)
    if any(totals["lost"]):
        raise NonFiniteStepError(row, _numbers(sums.lost))
    if not math.isfinite(whole_norm(totals["gradient_norms"])):
        raise NonFiniteStepError(row, with_lost_gradients(method, seeing, micro_batches))
    engine.step(totals["gradient_norms"])
    measurement.keep()
    state.calibrator.update(seen)
    of_pairs = [total / num_pairs for total in totals["statistics"]]
    state.objective_state = objective.advance(seeing.objective_state, of_pairs)
    state.step += 1
    return TrainedStep(row | state.calibrator.counts(), any(totals["asked_to_stop"]))


def forward_and_back(
    method: Method, state: TrainState, micro_batches: Sequence[MicroBatch], measurement: Measurement
) -> Sums:
    """This rank's micro-batches one after the other: their gradients are added up in the engine."""
    engine, objective = method.engine, method.objective
    quantities = torch.zeros(len(QUANTITIES), dtype=torch.float64, device=engine.device)
    statistics = quantities.new_zeros(objective.num_statistics)
    lost = []
    backward = backward_apart if measurement.takes_sides_apart else backward_together
    for micro_batch in micro_batches:
        priced = backward(method, state, micro_batch, measurement)
        engine.end_micro_batch()
        quantities += pair_sums(priced.loss, priced.plain, priced.incentives)
        statistics += objective.statistic_columns(priced.pair).double().sum(1)
        lost.append(~is_finite(priced))
    return Sums(quantities, statistics, torch.stack(lost))


def _with_router(total: Tensor, seen: Read) -> Tensor:
    return total if seen.router is None else total + seen.router


def _router_backward(method: Method, micro_batch: MicroBatch) -> None:
    """The share of the router's loss by a pass of its own, where the sides go one after the other."""
    if micro_batch.batch.expert_costs is not None:
        cost = read(method.engine.logprobs(micro_batch.batch), micro_batch.batch).router
        assert cost is not None
        method.engine.backward(cost, is_last=False)


def _likely_as_trained(method: Method, micro_batch: MicroBatch) -> Tensor | None:
    """The same with its graph, which at ZeRO 3 has to be made again right before it goes back."""
    if micro_batch.likely is None:
        return None
    with torch.no_grad() if method.engine.stage == 3 else nullcontext():
        return method.engine.logprobs(micro_batch.likely)


def _likely_backward(
    method: Method, micro_batch: MicroBatch, priced: Priced, likely: Tensor | None, is_last: bool
) -> None:
    """Its share of the gradient, which calibration does not scale: it is of neither side. Collective."""
    if micro_batch.likely is None or likely is None or priced.likely is None:
        return
    if method.engine.stage == 3:
        likely = method.engine.logprobs(micro_batch.likely)
    method.engine.backward((-priced.likely * likely).mean(), is_last)


def surrogate(priced: Priced, alpha: float) -> tuple[Tensor, Tensor]:
    """Coefficients of z_w and z_l whose gradient is the calibrated loss's: -alpha d_w and d_l / alpha, each
    (B,)."""
    return -alpha * priced.pulls.d_w, priced.pulls.d_l / alpha


def of_present(priced: Priced, micro_batch: MicroBatch) -> Incentives:
    """The incentives, scaled so that their means over the micro-batch's pairs are means over the responses
    that are there."""
    num_pairs, present = micro_batch.batch.num_pairs, micro_batch.batch.present
    if present is None:
        return priced.incentives
    d_w, d_l = priced.incentives
    return Incentives(
        d_w * (num_pairs / max(1, present.chosen)), d_l * (num_pairs / max(1, present.rejected))
    )


def backward_together(
    method: Method, state: TrainState, micro_batch: MicroBatch, measurement: Measurement
) -> Priced:
    """The ordinary micro-batch: both sides forward, and one pass back. Collective at ZeRO 3."""
    engine = method.engine
    likely = _likely_as_trained(method, micro_batch)
    with measurement.watching(engine):
        seen = read(engine.logprobs(micro_batch.batch), micro_batch.batch)
        z_w, z_l = seen.z.chunk(2)
        priced = priced_pass(method, state, micro_batch, seen, likely)
        geometry = measurement.of_micro_batch(micro_batch.batch)
        c_w, c_l = surrogate(priced, state.calibrator.alpha_of(of_present(priced, micro_batch), geometry))
        is_last = not measurement.has_passes_beside
        engine.backward(_with_router((c_w * z_w + c_l * z_l).mean(), seen), is_last and likely is None)
    _likely_backward(method, micro_batch, priced, likely, is_last)
    measurement.passes_beside(engine, micro_batch.batch, priced.pulls)
    return priced


def backward_apart(
    method: Method, state: TrainState, micro_batch: MicroBatch, measurement: Measurement
) -> Priced:
    """A micro-batch whose two halves of the gradient are caught one after the other: one pass back a side.
    ZeRO 3 wants each backward pass right after its own forward pass, so there the rejected side goes forward
    twice. Collective at ZeRO 3."""
    engine = method.engine
    chosen, rejected = micro_batch.batch.side(chosen=True), micro_batch.batch.side(chosen=False)
    goes_again = engine.stage == 3
    _router_backward(method, micro_batch)
    likely = _likely_as_trained(method, micro_batch)
    with torch.no_grad() if goes_again else nullcontext():
        of_rejected = read(engine.logprobs(rejected), rejected)
    of_chosen = read(engine.logprobs(chosen), chosen)
    priced = priced_pass(method, state, micro_batch, joined(of_chosen, of_rejected), likely)
    c_w, c_l = surrogate(priced, state.calibrator.alpha())
    with measurement.catching(CHOSEN):
        engine.backward((c_w * of_chosen.z).mean(), is_last=False)
    if goes_again:
        of_rejected = read(engine.logprobs(rejected), rejected)
    with measurement.catching(REJECTED):
        engine.backward((c_l * of_rejected.z).mean(), is_last=likely is None)
    _likely_backward(method, micro_batch, priced, likely, is_last=True)
    return priced


def is_finite(priced: Priced) -> Tensor:
    """Whether every loss, log-probability and incentive of a micro-batch is: bool scalar on the device."""
    likely = [] if priced.likely is None else [priced.likely]
    values = torch.cat([priced.loss, priced.pair.z_w, priced.pair.z_l, *priced.incentives, *likely])
    return values.isfinite().all()


def with_lost_gradients(method: Method, state: TrainState, micro_batches: Sequence[MicroBatch]) -> list[int]:
    """Which micro-batches of this rank have a gradient entry that is not finite, by a second pass over all of
    them; none where it is their sum alone. What it adds to the gradient is to be thrown away. Collective."""
    engine, largest = method.engine, []
    for micro_batch in micro_batches:
        with engine.largest_gradient() as found:
            likely = _likely_as_trained(method, micro_batch)
            seen = read(engine.logprobs(micro_batch.batch), micro_batch.batch)
            z_w, z_l = seen.z.chunk(2)
            priced = priced_pass(method, state, micro_batch, seen, likely)
            c_w, c_l = surrogate(priced, alpha=1.0)
            engine.backward(_with_router((c_w * z_w + c_l * z_l).mean(), seen), is_last=likely is None)
            _likely_backward(method, micro_batch, priced, likely, is_last=True)
        largest.append(torch.stack(found).isfinite().all())
    return _numbers(~torch.stack(largest))


def _router_row(method: Method, loss: float, router_loss: float | None) -> dict[str, float]:
    """The loss with the router's share, and that by itself; empty where none is asked for."""
    if router_loss is None:
        return {}
    return {"train/loss": loss + method.router_loss * router_loss, "train/router_loss": router_loss}


def _num_present(micro_batches: Sequence[MicroBatch]) -> list[float]:
    """Chosen responses, rejected ones and whole pairs of this rank."""
    nums = [each.batch.present or (each.batch.num_pairs,) * 3 for each in micro_batches]
    return [float(sum(column)) for column in zip(*nums, strict=True)]


def _numbers(lost: Tensor) -> list[int]:
    """Of a rank's micro-batches (M,) bool, those that are; waits for the device."""
    return [number for number, is_lost in enumerate(lost.tolist()) if is_lost]
