"""What a step must know of its global batch before the first micro-batch goes backward.

    with_mismatched     prompts with other pairs' responses           kto kl=mismatched: numbers of this batch
    with_sides_by_sign  what lists pull up, and what they push down   the two sides of a list
    with_lengths        of its own pairs' lengths                     acpo tau=batch: numbers of this batch
    with_mean_tokens    of the chosen responses                       likelihood terms: means over them
    with_partners       of the sorted numbers of all pairs            losses that compare ranks
    tilted              what the mean is not                          KL-DRO, Dr. DPO
    with_expert_costs   whose tokens the experts get                  model.router_loss

Each is nothing for a run that does not ask for it. Otherwise it is a pass without gradients over this rank's
micro-batches, or a reduction of a few numbers, under the weights before the step: so the loss does not depend
on how the batch is split over ranks and micro-batches. Called by `rcpo.training.step`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rcpo.models.policy import read
from rcpo.models.router import expert_costs
from rcpo.objectives import PairLogProbs
from rcpo.ranks.distributed import rank, sum_over_ranks, world_size
from rcpo.training.aggregate import Tilt
from rcpo.training.micro_batch import MicroBatch
from rcpo.training.pricing import pairs_of, price, priced_pass
from rcpo.training.state import Method, TrainState


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


def with_lengths(method: Method, state: TrainState, micro_batches: Sequence[MicroBatch]) -> TrainState:
    """`state` as the step sees it: with the objective's numbers of the global batch's lengths; `state` itself
    where it has none. One reduction then, of lengths, that waits for the device. Collective then."""
    objective = method.objective
    if not objective.needs_lengths:
        return state
    sums = []
    for micro_batch in micro_batches:
        nothing = torch.zeros(micro_batch.batch.num_pairs, device=micro_batch.batch.lengths.device)
        pair = pairs_of(micro_batch, nothing, nothing, state.objective_state)
        sums.append(objective.statistic_columns(pair, of_lengths=True).double().sum(1))
    means = sum_over_ranks(torch.stack(sums).sum(0)) / method.pairs_per_step
    numbers = objective.advance(state.objective_state, means.tolist(), of_lengths=True)
    return replace(state, objective_state=numbers)


def with_mean_tokens(method: Method, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
    """The micro-batches with the mean over the global batch of the tokens that a likelihood term is of, |y_w|
    mostly, where the objective needs it: one reduction, of lengths, that waits for the device. Collective
    then."""
    if not method.objective.needs_mean_tokens:
        return micro_batches
    is_beside = method.objective.reading.sft_is_beside
    parts = [] if is_beside else [each.batch.lengths.chunk(2)[0] for each in micro_batches]
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


def _likely_without_grad(method: Method, micro_batch: MicroBatch) -> Tensor | None:
    """Log-probability of the text beside, (B,). Collective at ZeRO 3."""
    return None if micro_batch.likely is None else method.engine.logprobs_without_grad(micro_batch.likely)


def tilted(method: Method, state: TrainState, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
    """The micro-batches as the aggregate wants them: untouched for the mean; for KL-DRO after a pass over all
    of them without gradients, which gives the losses that the tilts are made of. Where weights are of the
    batch (objective.weight_of=batch), losses are unweighted and the aggregate is times the mean weight, one
    reduction more. Collective."""
    mean_weight = None
    if method.weighs_batch:
        weights = torch.cat([each.weight for each in micro_batches])
        mean_weight = (sum_over_ranks(weights.double().sum()) / method.pairs_per_step).to(weights.dtype)
        micro_batches = [each._replace(weight=torch.ones_like(each.weight)) for each in micro_batches]
    if not method.aggregate.needs_losses:
        return micro_batches if mean_weight is None else _weighing(micro_batches, mean_weight)
    losses = []
    for micro_batch in micro_batches:
        likely = _likely_without_grad(method, micro_batch)
        seen = read(method.engine.logprobs_without_grad(micro_batch.batch), micro_batch.batch)
        losses.append(priced_pass(method, state, micro_batch, seen, likely).loss)
    tilts = method.aggregate.tilts(losses)
    if mean_weight is not None:
        tilts = [Tilt(mean_weight * tilt.p, mean_weight * tilt.total) for tilt in tilts]
    return [each._replace(tilt=tilt) for each, tilt in zip(micro_batches, tilts, strict=True)]


def _weighing(micro_batches: Sequence[MicroBatch], weight: Tensor) -> Sequence[MicroBatch]:
    """With one weight for every pair."""
    return [each._replace(weight=weight * each.weight) for each in micro_batches]
