"""From the losses of a global batch's pairs to its one loss: the mean, or what a run puts in its place.

An aggregate gives `rcpo.training.step` a `Tilt` for each micro-batch, by which loss and incentives are scaled
so that their means over the global batch are the aggregated loss and its derivatives. Everything behind it
(surrogate, calibration, geometry, metrics) is as with the mean. It sees losses alone: no model, no objective.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rcpo.objectives import Composition
from rcpo.ranks.distributed import rank, sum_over_ranks, world_size


class Tilt(NamedTuple):
    """What an aggregate makes of the pairs of one micro-batch."""

    p: Tensor
    """(B,): what multiplies a pair's incentives; its mean over the global batch is 1."""
    total: Tensor
    """(): the aggregated loss, which every pair gets."""


class Mean:
    """(1/B) sum_i loss_i: no tilt."""

    needs_losses = False

    def tilts(self, losses: Sequence[Tensor]) -> list[Tilt]:
        raise NotImplementedError("the mean tilts nothing")

    def of_all(self, losses: Tensor) -> float:
        """The aggregated loss of pairs that are all here (n,)."""
        return float(losses.double().mean())


class KlDro:
    """L = lambda log((1/B) sum_i exp(loss_i / lambda)) over the global batch: the largest mean loss of any
    reweighting q of the pairs, less lambda KL(q, uniform).

    dL/dz_i = (p_i / B) dloss_i/dz_i with p_i = exp(loss_i / lambda) / ((1/B) sum_j exp(loss_j / lambda)): a
    pair's incentives are times p_i, whose mean is 1. The loss of every pair is L, which is p_i loss_i less
    its share of lambda KL, so that its mean is L. A sample weight is inside: loss_i is the weighted loss, as
    in DoRA's published code (arXiv 2504.05831), and a pair of weight 0 is pulled nowhere but counts in B.

    p is exact however the batch is split: a forward pass over this rank's micro-batches without gradients,
    before the first is trained on, gives all losses, and one reduction, which the host does not wait for,
    their sum. Cost: that pass, about a third of an ordinary step. It runs without dropout, so with
    model.lora.dropout p is that of the model as evaluated. The exponent is at most 0: no loss/lambda
    overflows; it has the losses' fp32 rounding, so at loss/lambda = 1e4 p is right to about 1e-3.
    """

    needs_losses = True

    def __init__(self, dro_lambda: float) -> None:
        self._lambda = dro_lambda

    def tilts(self, losses: Sequence[Tensor]) -> list[Tilt]:
        """One tilt a micro-batch, from the losses (B,) of this rank's micro-batches, as many pairs on every
        rank. Collective: one reduction."""
        p, total = tilt(torch.cat(list(losses)), self._lambda)
        return [Tilt(share, total) for share in p.split([len(loss) for loss in losses])]

    def of_all(self, losses: Tensor) -> float:
        """As the mean's."""
        exponents = losses.double() / self._lambda
        return self._lambda * (float(exponents.logsumexp(0)) - math.log(len(losses)))


class DrDpo(KlDro):
    """L = -lambda log((1/B) sum_i exp(-loss_i / lambda)): the smallest mean loss of any reweighting q of the
    pairs, plus lambda KL(q, uniform). A pair whose loss is large, as where its label is wrong, counts little.

    KL-DRO with -lambda in the place of lambda, and so exact and as dear as that. Dr. DPO, Wu et al. 2024
    (arXiv 2407.07880), whose beta' is lambda.
    """

    def __init__(self, dro_lambda: float) -> None:
        super().__init__(-dro_lambda)


Aggregate: TypeAlias = Mean | KlDro


def tilt(losses: Tensor, dro_lambda: float) -> tuple[Tensor, Tensor]:
    """From this rank's losses (n,), as many on every rank: p_i (n,) and L (), of the global batch. One
    reduction."""
    exponents = losses.double() / dro_lambda
    of_ranks = exponents.new_zeros(world_size())
    of_ranks[rank()] = exponents.logsumexp(0)
    log_mean = sum_over_ranks(of_ranks).logsumexp(0) - math.log(len(losses) * world_size())
    return (exponents - log_mean).exp().to(losses.dtype), (dro_lambda * log_mean).to(losses.dtype)


def spread_over(spread: Tensor, weight: Tensor, losses: Tensor, dro_lambda: float) -> tuple[Tensor, Tensor]:
    """From losses L (B,) of pairs or lists, one weight w_i = weight spread_i for each of their n responses,
    spread (B, K) with nan behind the n:

        l = lambda log((1/n) sum_i exp(w_i L / lambda)),    dl/dL = sum_i p_i w_i,  p the exponents' softmax

    so that KL-DRO of l has an exponent for each response (`rcpo.records.weights`, each). Both (B,)."""
    is_there = ~spread.isnan()
    each = weight[:, None] * spread.masked_fill(~is_there, 0.0)
    exponents = (each * losses[:, None] / dro_lambda).masked_fill(~is_there, -math.inf)
    mean = exponents.logsumexp(1) - is_there.sum(1).log()
    return dro_lambda * mean, (exponents.softmax(1) * each).sum(1)


def aggregate_of(composition: Composition) -> Aggregate:
    """The aggregate that a composition names."""
    kind = {"kl_dro": KlDro, "dr_dpo": DrDpo}.get(composition.aggregate)
    return Mean() if kind is None else kind(composition.dro_lambda)
