"""What the objective says of a micro-batch: its loss, and the incentives of both sides.

Owns the way from the numbers of a pass (z, and what else an objective reads) to `Priced`. Called by
`rcpo.training.step` for what is trained on, by `rcpo.training.beforehand` for what a step must know first.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rcpo.method.incentives import Incentives, derivatives
from rcpo.models.policy import Read
from rcpo.objectives import Objective, PairLogProbs
from rcpo.objectives.loss import sides_there
from rcpo.training.aggregate import spread_over
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
    if micro_batch.spread is None or objective.spread_lambda is None:
        loss = weight * loss
    else:
        loss, weight = spread_over(micro_batch.spread, weight, loss, objective.spread_lambda)
    d_w, d_l = weight * d_w, weight * d_l
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


def joined(of_chosen: Read, of_rejected: Read) -> Read:
    """Both sides of a batch, from passes over one after the other; detached."""
    z = torch.cat([of_chosen.z.detach(), of_rejected.z.detach()])
    sums = log_weights = None
    if of_chosen.sums is not of_chosen.z:
        sums = torch.cat([of_chosen.sums, of_rejected.sums])
    if of_chosen.log_weights is not None and of_rejected.log_weights is not None:
        log_weights = torch.cat([of_chosen.log_weights, of_rejected.log_weights])
    return Read(z, z if sums is None else sums, log_weights)
