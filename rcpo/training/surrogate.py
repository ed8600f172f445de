"""From a micro-batch to its backward pass: the price (loss and incentives), and the surrogate whose gradient
is the loss's, calibrated. `rcpo.training.step` explains the method."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from rcpo.data.batch import PairBatch
from rcpo.method.incentives import Incentives, loss_and_incentives
from rcpo.models.engine import Engine
from rcpo.objectives import Objective, PairLogProbs


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
