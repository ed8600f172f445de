"""From the losses of a global batch's pairs to its one loss: the mean, or what a run puts in its place.

An aggregate gives `rcpo.training.step` each micro-batch with its price: loss and incentives of the aggregated
loss, scaled so that their means over the global batch are the aggregated loss and its derivatives. Everything
behind it (surrogate, calibration, geometry, metrics) is as with the mean. Called by `rcpo.training.loop`
(which one) and `rcpo.training.step` (use it)."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from rcpo.method.incentives import Incentives
from rcpo.models.engine import Engine
from rcpo.objectives import Composition, Objective
from rcpo.ranks.distributed import rank, sum_over_ranks, world_size
from rcpo.training.step import Aggregate
from rcpo.training.surrogate import MicroBatch, Price, Priced, price


class Mean:
    """(1/B) sum_i loss_i: every pair at its own price."""

    def prices(
        self, engine: Engine, objective: Objective, state: tuple[float, ...], batches: Sequence[MicroBatch]
    ) -> Iterator[tuple[MicroBatch, Price]]:
        for batch in batches:
            yield batch, partial(price, objective, state, batch)


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

    def __init__(self, dro_lambda: float) -> None:
        self._lambda = dro_lambda

    def prices(
        self, engine: Engine, objective: Objective, state: tuple[float, ...], batches: Sequence[MicroBatch]
    ) -> Iterator[tuple[MicroBatch, Price]]:
        losses = []
        for batch in batches:
            z_w, z_l = engine.logprobs_without_grad(batch.batch).chunk(2)
            losses.append(price(objective, state, batch, z_w, z_l).loss)
        p, total = tilt(torch.cat(losses), self._lambda)
        for batch, share in zip(batches, p.split([len(loss) for loss in losses]), strict=True):
            yield batch, partial(_tilted, partial(price, objective, state, batch), share, total)


def tilt(losses: Tensor, dro_lambda: float) -> tuple[Tensor, Tensor]:
    """From this rank's losses (n,), as many on every rank: p_i (n,) and L (), of the global batch. One
    reduction."""
    exponents = losses.double() / dro_lambda
    of_ranks = exponents.new_zeros(world_size())
    of_ranks[rank()] = exponents.logsumexp(0)
    log_mean = sum_over_ranks(of_ranks).logsumexp(0) - math.log(len(losses) * world_size())
    return (exponents - log_mean).exp().to(losses.dtype), (dro_lambda * log_mean).to(losses.dtype)


def _tilted(inner: Price, p: Tensor, total: Tensor, z_w: Tensor, z_l: Tensor) -> Priced:
    priced = inner(z_w, z_l)
    d_w, d_l = priced.incentives
    return Priced(priced.pair, total.expand_as(priced.loss), Incentives(p * d_w, p * d_l))


def aggregate_of(composition: Composition) -> Aggregate:
    """The aggregate that a composition names."""
    return KlDro(composition.dro_lambda) if composition.aggregate == "kl_dro" else Mean()
