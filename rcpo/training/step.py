"""One optimizer step of the method: the file to read first.

    by sign     lists: what is pulled up, what pushed down   the two sides, by a pass more (training.by_sign)
    mismatched  prompts with other pairs' responses          objectives that need them: numbers of this batch
    mean_tokens of the global batch's chosen responses       likelihood terms that are means over its tokens
    likely      = log-prob of a text beside the responses    likelihood terms of it: a pass of its own
    z           = log pi(y|x) of both sides                  models.policy, attached to the graph
    loss        = weight * objective(z, ref, |y|)            objectives, on detached leaves
    d_w, d_l    = -dL/dz_w, +dL/dz_l                         method.incentives, by autograd
    partners    of the global batch's sorted numbers         losses that compare ranks: a pass more
    tilt        = what the mean is not: KL-DRO               training.aggregate, scales loss and incentives
    experts     whose tokens the global batch counts         a router's loss: a pass more, and a term beside
    surrogate   = mean(-alpha d_w z_w + (d_l/alpha) z_l)     its gradient is the loss's, calibrated
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
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rcpo.engine.gradient_norm import whole_norm
from rcpo.method.incentives import Incentives, derivatives
from rcpo.method.metrics import QUANTITIES, balance_row, means_of, pair_sums, statistics_of, step_row
from rcpo.method.scores import CHOSEN, REJECTED
from rcpo.method.statistics import Probe
from rcpo.models.policy import Read, read
from rcpo.models.router import expert_costs
from rcpo.objectives import Objective, PairLogProbs
from rcpo.objectives.loss import sides_there
from rcpo.ranks.distributed import rank, sum_over_ranks, sum_parts_over_ranks, world_size
from rcpo.training.measurement import Measurement
from rcpo.training.micro_batch import MicroBatch
from rcpo.training.state import Method, TrainState


class More(NamedTuple):
    """What a micro-batch's passes give beside z; each None where it is not asked for. Detached, (B,)."""

    sums: tuple[Tensor, Tensor] | None = None
    """z_w, z_l with all tokens alike, where z counts them differently."""
    log_weight: Tensor | None = None
    """Log of WPO's weight."""
    likely: Tensor | None = None
    """Log-probability of the text beside the responses."""


NO_MORE = More()


class Priced(NamedTuple):
    """A micro-batch after the objective has seen it; every tensor (B,), detached."""

    pair: PairLogProbs
    """Log-probs summed over tokens, whatever the objective reads; times what tokens count."""
    loss: Tensor
    incentives: Incentives
    """By what the objective reads of z: its sum, or its mean over tokens."""
    pulls: Incentives
    """By the sum z: the same, or divided by |y|."""
    plain: PairLogProbs
    """What displacement is measured of: all tokens alike, and the reference that it is measured against."""
    likely: Tensor | None = None
    """By the log-probability of the text beside the responses."""


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
    seeing = with_mismatched(method, state, mismatched)
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
    if router_loss is not None:
        row["train/loss"] += method.router_loss * router_loss
        row["train/router_loss"] = router_loss
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


def with_mismatched(method: Method, state: TrainState, mismatched: Sequence[MicroBatch]) -> TrainState:
    """`state` as the step sees it: with the objective's numbers of the global batch's mismatched pairs, under
    the weights before the step and without a gradient; `state` itself where the objective has none.
    Collective."""
    objective = method.objective
    if not objective.needs_mismatched:
        return state
    sums = []
    for micro_batch in mismatched:
        z_w, z_l = method.engine.logprobs_without_grad(micro_batch.batch).chunk(2)
        pair = pairs_of(micro_batch, z_w, z_l, state.objective_state)
        sums.append(objective.statistic_columns(pair, of_mismatched=True).double().sum(1))
    means = sum_over_ranks(torch.stack(sums).sum(0)) / method.pairs_per_step
    numbers = objective.advance(state.objective_state, means.tolist(), of_mismatched=True)
    return replace(state, objective_state=numbers)


def with_mean_tokens(method: Method, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
    """The micro-batches with the mean |y_w| of the global batch, where the objective needs it: one reduction,
    of lengths, that waits for the device. Collective then."""
    if not method.objective.needs_mean_tokens:
        return micro_batches
    parts = [each.batch.lengths.chunk(2)[0] for each in micro_batches]
    parts += [each.likely.lengths for each in micro_batches if each.likely is not None]
    mean = float(sum_over_ranks(torch.cat(parts).double().sum())) / method.pairs_per_step
    return [each._replace(mean_tokens=mean) for each in micro_batches]


def with_sides_by_sign(
    method: Method, state: TrainState, micro_batches: Sequence[MicroBatch]
) -> Sequence[MicroBatch]:
    """The micro-batches of lists with their two sides by sign, under the weights before the step: chosen is
    what the loss pulls up, d_i = -dL/dz_i > 0, rejected what it pushes down, and what it does neither with
    stays. The loss knows responses by rank, so it and its gradient do not change:

        grad L = -sum_{d_i > 0} d_i grad z_i + sum_{d_i < 0} |d_i| grad z_i = -G_w + G_l

    A forward pass without gradients over all of them, about a third of a step, and one wait for the device.
    Untouched where pairs are, whose sides are by label. Collective at ZeRO 3."""
    is_up = []
    for each in micro_batches:
        if each.by_sign is None:
            return micro_batches
        z_w, z_l = method.engine.logprobs_without_grad(each.batch).chunk(2)
        d_w, d_l = price(method.objective, state.objective_state, each, z_w, z_l).incentives
        is_up.append(torch.cat([d_w >= 0, d_l < 0]))
    known = torch.cat(is_up).cpu().split([len(each) for each in is_up])
    return [
        each.by_sign(signs)
        for each, signs in zip(micro_batches, known, strict=True)
        if each.by_sign is not None
    ]


def with_partners(method: Method, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
    """The micro-batches with what their sides are compared with in the global batch, under the weights before
    the step, where the objective compares ranks: a pass over all of them without gradients, and one gather of
    six numbers a pair. Exact however the batch is split. Collective then."""
    objective = method.objective
    if objective.match is None:
        return micro_batches
    columns, sizes = [], []
    for each in micro_batches:
        z_w, z_l = read(method.engine.logprobs_without_grad(each.batch), each.batch).z.chunk(2)
        pair = pairs_of(each, z_w, z_l, ())
        columns.append(torch.stack([z_w, z_l, pair.ref_w, pair.ref_l, pair.len_w, pair.len_l]))
        sizes.append(len(z_w))
    own = torch.cat(columns, dim=1)
    parts = own.new_zeros(world_size(), *own.shape)
    parts[rank()] = own
    whole = sum_over_ranks(parts).transpose(0, 1).flatten(1)
    partners = torch.stack(objective.partners_of(PairLogProbs(*whole)))
    of_rank = partners.unflatten(1, (world_size(), -1))[:, rank()].split(sizes, dim=1)
    return [
        each._replace(partners=(both[0], both[1])) for each, both in zip(micro_batches, of_rank, strict=True)
    ]


def with_expert_costs(
    method: Method, micro_batches: Sequence[MicroBatch]
) -> tuple[float | None, Sequence[MicroBatch]]:
    """The load-balancing loss of the global batch, and the micro-batches with what each expert's probability
    costs in it, where model.router_loss asks for it: a pass over all of them without gradients and one
    reduction of 2E + 1 numbers. Which tokens an expert gets has no gradient, so that the loss is then a sum
    over tokens, exact however the batch is split. It is of neither side, and calibration does not scale it.
    Collective then."""
    if not method.router_loss:
        return None, micro_batches
    sums = torch.stack([method.engine.expert_sums(each.batch) for each in micro_batches]).sum(0)
    loss, costs = expert_costs(sum_over_ranks(sums))
    made = []
    for each in micro_batches:
        # The engine takes the mean over micro-batches, of which there are pairs_per_step / num_pairs.
        scale = method.router_loss * method.pairs_per_step / each.batch.num_pairs
        made.append(each._replace(batch=each.batch._replace(expert_costs=scale * costs)))
    return loss, made


def _with_router(total: Tensor, seen: Read) -> Tensor:
    return total if seen.router is None else total + seen.router


def _router_backward(method: Method, micro_batch: MicroBatch) -> None:
    """The share of the router's loss by a pass of its own, where the sides go one after the other."""
    if micro_batch.batch.expert_costs is not None:
        cost = read(method.engine.logprobs(micro_batch.batch), micro_batch.batch).router
        assert cost is not None
        method.engine.backward(cost, is_last=False)


def pairs_of(
    micro_batch: MicroBatch,
    z_w: Tensor,
    z_l: Tensor,
    objective_state: tuple[float, ...],
    likely: Tensor | None = None,
) -> PairLogProbs:
    """What an objective sees of a micro-batch at z_w, z_l (B,) fp32, and at the log-probability of the text
    beside."""
    batch = micro_batch.batch
    len_w, len_l, present = sides_there(batch.lengths.to(z_w.dtype), batch.present is None)
    ref_w, ref_l = micro_batch.read_ref or (micro_batch.ref_w, micro_batch.ref_l)
    likely_tokens = None if micro_batch.likely is None else micro_batch.likely.lengths.to(z_w.dtype)
    return PairLogProbs(
        z_w, z_l, ref_w, ref_l, len_w, len_l, objective_state,
        mean_tokens=micro_batch.mean_tokens, partners=micro_batch.partners, present=present,
        likely=likely, likely_tokens=likely_tokens, lists=micro_batch.lists,
    )  # fmt: skip


def price(
    objective: Objective,
    objective_state: tuple[float, ...],
    micro_batch: MicroBatch,
    z_w: Tensor,
    z_l: Tensor,
    more: More = NO_MORE,
) -> Priced:
    """Loss and incentives of a micro-batch's pairs at detached z_w, z_l (B,) fp32: of the objective, times
    the pairs' weights, as the aggregate tilts them."""
    pair = pairs_of(micro_batch, z_w, z_l, objective_state, more.likely)
    loss, (d_w, d_l), d_likely = derivatives(objective, objective.view(pair))
    weight = micro_batch.weight
    if more.log_weight is not None:
        weight = weight * more.log_weight.exp()
    loss, d_w, d_l = weight * loss, weight * d_w, weight * d_l
    if micro_batch.tilt is not None:
        p, total = micro_batch.tilt
        loss, d_w, d_l, weight = total.expand_as(loss), p * d_w, p * d_l, p * weight
    incentives = Incentives(d_w, d_l)
    pulls = Incentives(d_w / pair.len_w, d_l / pair.len_l) if objective.averages else incentives
    plain = pair
    if more.sums is not None or micro_batch.read_ref is not None:
        sums_w, sums_l = more.sums or (z_w, z_l)
        plain = pair._replace(z_w=sums_w, z_l=sums_l, ref_w=micro_batch.ref_w, ref_l=micro_batch.ref_l)
    return Priced(pair, loss, incentives, pulls, plain, None if d_likely is None else weight * d_likely)


def priced_pass(
    method: Method, state: TrainState, micro_batch: MicroBatch, seen: Read, likely: Tensor | None
) -> Priced:
    """`price` at what the passes over a micro-batch and over its text beside have given, detached."""
    sums = log_weight = None
    if seen.sums is not seen.z:
        sums_w, sums_l = seen.sums.detach().chunk(2)
        sums = (sums_w, sums_l)
    if seen.log_weights is not None:
        log_weight = torch.stack(seen.log_weights.detach().chunk(2)).sum(0)
    more = More(sums, log_weight, None if likely is None else likely.detach())
    z_w, z_l = seen.z.detach().chunk(2)
    return price(method.objective, state.objective_state, micro_batch, z_w, z_l, more)


def _likely_without_grad(method: Method, micro_batch: MicroBatch) -> Tensor | None:
    """Log-probability of the text beside, (B,). Collective at ZeRO 3."""
    return None if micro_batch.likely is None else method.engine.logprobs_without_grad(micro_batch.likely)


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


def tilted(method: Method, state: TrainState, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
    """The micro-batches as the aggregate wants them: untouched for the mean; for KL-DRO after a pass over all
    of them without gradients, which gives the losses that the tilts are made of. Collective."""
    if not method.aggregate.needs_losses:
        return micro_batches
    losses = []
    for micro_batch in micro_batches:
        likely = _likely_without_grad(method, micro_batch)
        seen = read(method.engine.logprobs_without_grad(micro_batch.batch), micro_batch.batch)
        losses.append(priced_pass(method, state, micro_batch, seen, likely).loss)
    tilts = method.aggregate.tilts(losses)
    return [each._replace(tilt=tilt) for each, tilt in zip(micro_batches, tilts, strict=True)]


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
    priced = priced_pass(method, state, micro_batch, _joined(of_chosen, of_rejected), likely)
    c_w, c_l = surrogate(priced, state.calibrator.alpha())
    with measurement.catching(CHOSEN):
        engine.backward((c_w * of_chosen.z).mean(), is_last=False)
    if goes_again:
        of_rejected = read(engine.logprobs(rejected), rejected)
    with measurement.catching(REJECTED):
        engine.backward((c_l * of_rejected.z).mean(), is_last=likely is None)
    _likely_backward(method, micro_batch, priced, likely, is_last=True)
    return priced


def _joined(of_chosen: Read, of_rejected: Read) -> Read:
    """Both sides of a batch, from passes over one after the other; detached."""
    z = torch.cat([of_chosen.z.detach(), of_rejected.z.detach()])
    sums = log_weights = None
    if of_chosen.sums is not of_chosen.z:
        sums = torch.cat([of_chosen.sums, of_rejected.sums])
    if of_chosen.log_weights is not None and of_rejected.log_weights is not None:
        log_weights = torch.cat([of_chosen.log_weights, of_rejected.log_weights])
    return Read(z, z if sums is None else sums, log_weights)


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


def _num_present(micro_batches: Sequence[MicroBatch]) -> list[float]:
    """Chosen responses, rejected ones and whole pairs of this rank."""
    nums = [each.batch.present or (each.batch.num_pairs,) * 3 for each in micro_batches]
    return [float(sum(column)) for column in zip(*nums, strict=True)]


def _numbers(lost: Tensor) -> list[int]:
    """Of a rank's micro-batches (M,) bool, those that are; waits for the device."""
    return [number for number, is_lost in enumerate(lost.tolist()) if is_lost]
