"""Objectives that are functions of z and the lengths alone; no reference forward is ever needed for these.

Called through `rcpo.objectives.load_objective`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpo.objectives.loss import PairLogProbs
from rcpo.objectives.numerics import expm1_linear
from rcpo.objectives.parameters import require, require_not_negative, require_positive
from rcpo.objectives.registry import objective


@dataclass(frozen=True)
class SFTConfig:
    """No parameters."""


@objective("sft", SFTConfig, needs_reference=False)
def sft(pair: PairLogProbs, config: SFTConfig) -> Tensor:
    """-z_w / |y_w|, per pair (B,): maximum likelihood of the chosen response, a mean over its tokens."""
    return pair.likelihood_loss()


@dataclass(frozen=True)
class SimPOConfig:
    beta: float
    """Scale of the per-token margin, > 0; the paper's range is 2 to 2.5."""
    gamma: float
    """Target margin, >= 0. This is gamma itself, not the ratio gamma/beta that some tools call the margin."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require_not_negative(self, "gamma")


@objective("simpo", SimPOConfig, needs_reference=False)
def simpo(pair: PairLogProbs, config: SimPOConfig) -> Tensor:
    """-log sigmoid(beta * (z_w/|y_w| - z_l/|y_l|) - gamma), per pair (B,). Meng et al. 2024 (arXiv
    2405.14734)."""
    margin = pair.z_w / pair.len_w - pair.z_l / pair.len_l
    return pair.sigmoid_loss(config.beta * margin - config.gamma)


@dataclass(frozen=True)
class AlphaPOConfig:
    beta: float
    """Scale of the margin, > 0."""
    gamma: float
    """Target margin, >= 0; gamma itself, as in simpo."""
    a: float
    """Shape of the reward, not 0 (its limit there is simpo); the paper's alpha."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require_not_negative(self, "gamma")
        require(self, "a", self.a != 0, "other than 0, where the loss is simpo's")


@objective("alpha_po", AlphaPOConfig, needs_reference=False)
def alpha_po(pair: PairLogProbs, config: AlphaPOConfig) -> Tensor:
    """-log sigmoid(beta * (u_w - u_l) - gamma), u = (1 - e^(-a z/|y|)) / a, per pair (B,).

    The exponential is linear beyond exponent 30: at the default a, where the mean token has lost 120 nats.
    Gupta et al. 2025 (arXiv 2501.03884).
    """
    u_w = -expm1_linear(-config.a * pair.z_w / pair.len_w) / config.a
    u_l = -expm1_linear(-config.a * pair.z_l / pair.len_l) / config.a
    return pair.sigmoid_loss(config.beta * (u_w - u_l) - config.gamma)


@dataclass(frozen=True)
class CPOConfig:
    beta: float
    """Scale of the summed margin, > 0."""
    lambda_: float
    """Weight of the likelihood term on the chosen response, per token, >= 0."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require_not_negative(self, "lambda_")


@objective("cpo", CPOConfig, needs_reference=False)
def cpo(pair: PairLogProbs, config: CPOConfig) -> Tensor:
    """-log sigmoid(beta * m) - lambda * z_w/|y_w|, per pair (B,). Xu et al. 2024 (arXiv 2401.08417).

    The paper writes the likelihood term as a sum over tokens; here it is the mean, as cross-entropy in its
    code.
    """
    margin = pair.z_w - pair.z_l
    return pair.sigmoid_loss(config.beta * margin) + pair.likelihood_loss(config.lambda_)


@dataclass(frozen=True)
class SLiCConfig:
    delta: float
    """Margin in nats beyond which a pair has no ranking incentive, >= 0; the paper's 1."""
    lambda_: float
    """Weight of the likelihood term on the chosen response, summed over tokens, >= 0."""

    def __post_init__(self) -> None:
        require_not_negative(self, "delta", "lambda_")


@objective("slic", SLiCConfig, needs_reference=False)
def slic(pair: PairLogProbs, config: SLiCConfig) -> Tensor:
    """max(0, delta - m) - lambda * z_w, per pair (B,). Zhao et al. 2023 (arXiv 2305.10425).

    The paper's regulariser is the likelihood of the SFT target; here, as in the tables of later papers, y_w
    is that.
    """
    ranking = F.relu(config.delta - (pair.z_w - pair.z_l))
    return ranking + pair.likelihood_loss(config.lambda_, mean="sum")


LOG_ODDS_LIMIT = -1e-5
"""Mean token log-prob beyond which `log_odds` is linear: nearer to 0 an fp32 log-softmax is rounding
noise."""


def log_odds(a: Tensor) -> Tensor:
    """a - log(1 - e^a) for a mean token log-prob a <= 0; tangent (slope 1e5) for a > LOG_ODDS_LIMIT.

    Probability 1 has infinite log-odds and slope; the tangent keeps both finite, also where rounding makes a
    > 0.
    """
    inside = a.clamp(max=LOG_ODDS_LIMIT)
    slope = -1 / math.expm1(LOG_ODDS_LIMIT)
    return inside - torch.log(-torch.expm1(inside)) + slope * F.relu(a - LOG_ODDS_LIMIT)


@dataclass(frozen=True)
class ORPOConfig:
    lambda_: float
    """Weight of the odds-ratio term, >= 0; the paper's 0.1."""

    def __post_init__(self) -> None:
        require_not_negative(self, "lambda_")


@objective("orpo", ORPOConfig, needs_reference=False)
def orpo(pair: PairLogProbs, config: ORPOConfig) -> Tensor:
    """-z_w/|y_w| - lambda log sigmoid(logodds(z_w/|y_w|) - logodds(z_l/|y_l|)), per pair (B,).

    logodds(a) = a - log(1 - e^a), linear for a > -1e-5. Hong et al. 2024 (arXiv 2403.07691).
    """
    mean_w, mean_l = pair.z_w / pair.len_w, pair.z_l / pair.len_l
    odds_loss = pair.sigmoid_loss(log_odds(mean_w) - log_odds(mean_l))
    return pair.likelihood_loss() + config.lambda_ * odds_loss
