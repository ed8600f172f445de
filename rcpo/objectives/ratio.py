"""Objectives from density-ratio estimation: the log-ratio to the reference estimates how much likelier y is
as chosen.

Called through `rcpo.objectives.load_objective`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpo.objectives.loss import PairLogProbs
from rcpo.objectives.numerics import exp_linear
from rcpo.objectives.parameters import require, require_positive
from rcpo.objectives.registry import objective


@dataclass(frozen=True)
class DensityRatioConfig:
    """No parameters."""


@objective("dil_bce", DensityRatioConfig, needs_reference=True)
def dil_bce(pair: PairLogProbs, config: DensityRatioConfig) -> Tensor:
    """-log sigmoid(r_w) - log sigmoid(-r_l), per pair (B,): density-ratio estimation by binary cross-entropy.

    Direct imitation learning, Xiao et al. 2025 (arXiv 2503.05079), as tabulated in arXiv 2604.18239.
    """
    return pair.add_sides(pair.sigmoid_loss(pair.r_w), pair.sigmoid_loss(-pair.r_l))


@objective("dil_lsif", DensityRatioConfig, needs_reference=True)
def dil_lsif(pair: PairLogProbs, config: DensityRatioConfig) -> Tensor:
    """-e^(r_w) + e^(2 r_l)/2, per pair (B,): density-ratio estimation by least squares.

    Both exponentials are linear beyond exponent 30 (r_w > 30, r_l > 15 nats), with the slope they have there:
    the formula overflows fp32 at 88. Xiao et al. 2025 (arXiv 2503.05079), as tabulated in arXiv 2604.18239.
    """
    return pair.add_sides(-exp_linear(pair.r_w), exp_linear(2 * pair.r_l) / 2)


@objective("dil_ukl", DensityRatioConfig, needs_reference=True)
def dil_ukl(pair: PairLogProbs, config: DensityRatioConfig) -> Tensor:
    """-z_w + e^(r_l), per pair (B,): density-ratio estimation by the unnormalised KL divergence.

    The exponential is linear beyond r_l = 30 nats, with the slope it has there. Xiao et al. 2025 (arXiv
    2503.05079), as tabulated in arXiv 2604.18239.
    """
    return pair.add_sides(-pair.z_w, exp_linear(pair.r_l))


POLE_GAP = 1e-3
"""2 - e^(r_l) where ddro goes over into its tangent."""


@objective("ddro", DensityRatioConfig, needs_reference=True)
def ddro(pair: PairLogProbs, config: DensityRatioConfig) -> Tensor:
    """-r_w - log(2 - e^(r_l)) + 2 log 2, per pair (B,): direct density-ratio optimisation.

    The pole at r_l = log 2 is never reached: beyond e^(r_l) = 2 - 1e-3 the tangent takes over, with slope
    1999, so the incentive stays what the loss's own slope is there. log(2 - e^r) is written as log 2 + log(1
    - e^(r - log 2)), which keeps its digits near the pole. Higuchi and Suzuki 2025 (arXiv 2505.07558), of
    pairs both responses.
    """
    limit = math.log(2 - POLE_GAP)
    inside = pair.r_l.clamp(max=limit)
    below_pole = math.log(2) - torch.log(-torch.expm1(inside - math.log(2)))
    beyond = (2 - POLE_GAP) / POLE_GAP * F.relu(pair.r_l - limit)
    return pair.add_sides(-pair.r_w, below_pole, beyond)


@dataclass(frozen=True)
class BoundedDPOConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""
    lam: float
    """Share of the policy in the mixture that stands for the rejected side, between 0 and 1; the rest is
    reference."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require(self, "lam", 0 < self.lam < 1, "between 0 and 1")


@objective("bdpo", BoundedDPOConfig, needs_reference=True)
def bdpo(pair: PairLogProbs, config: BoundedDPOConfig) -> Tensor:
    """-log sigmoid(beta (r_w - log(lam e^(r_l) + 1 - lam))), per pair (B,): the rejected side's ratio is
    bounded below.

    The mixture's log-ratio comes from logaddexp: no overflow for any r_l. Cho et al. 2025 (arXiv 2506.12725).
    """
    mixture = torch.logaddexp(
        pair.r_l + math.log(config.lam), torch.full_like(pair.r_l, math.log1p(-config.lam))
    )
    return pair.sigmoid_loss(config.beta * (pair.r_w - mixture))
