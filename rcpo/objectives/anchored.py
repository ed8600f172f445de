"""Hand-made cures for displacement: a term that holds the chosen response up, or a weaker push on the
rejected one.

Called through `rcpo.objectives.load_objective`. Reward calibration (`rcpo.method.calibrators`) composes with
them as with all."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpo.objectives.loss import BatchStatistic, PairLogProbs
from rcpo.objectives.parameters import require, require_not_negative, require_positive
from rcpo.objectives.registry import objective


@dataclass(frozen=True)
class CalDPOConfig:
    beta: float
    """Inverse of twice the log-ratio that each side is to reach, > 0; the paper's 1e-3."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")


@objective("cal_dpo", CalDPOConfig, needs_reference=True)
def cal_dpo(pair: PairLogProbs, config: CalDPOConfig) -> Tensor:
    """-log sigmoid(mt) + 1/2 [(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2], per pair (B,).

    The squares give the log-ratios an absolute scale. Xiao et al. 2024 (arXiv 2412.14516).
    """
    target = 1 / (2 * config.beta)
    squares = (pair.r_w - target) ** 2 + (pair.r_l + target) ** 2
    return pair.sigmoid_loss(pair.r_w - pair.r_l) + squares / 2


@dataclass(frozen=True)
class DPOPConfig:
    beta: float
    """Strength of the pull to the reference, > 0; the paper's 0.3."""
    lambda_: float
    """Penalty per nat that the chosen response has fallen, >= 0; the paper's 50."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require_not_negative(self, "lambda_")


@objective("dpop", DPOPConfig, needs_reference=True)
def dpop(pair: PairLogProbs, config: DPOPConfig) -> Tensor:
    """-log sigmoid(beta (mt - lambda max(0, -r_w))), per pair (B,): DPO-positive, called Smaug.

    Pal et al. 2024 (arXiv 2402.13228).
    """
    return pair.sigmoid_loss(config.beta * (pair.margin() - config.lambda_ * F.relu(-pair.r_w)))


@dataclass(frozen=True)
class RPOConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""
    a: float
    """Weight of the DPO term beside the likelihood term, >= 0; the paper's alpha, 1."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require_not_negative(self, "a")


@objective("rpo", RPOConfig, needs_reference=True)
def rpo(pair: PairLogProbs, config: RPOConfig) -> Tensor:
    """-z_w/|y_w| - a log sigmoid(beta mt), per pair (B,): DPO with a likelihood term.

    Iterative reasoning preference optimisation, Pang et al. 2024 (arXiv 2404.19733).
    """
    return pair.likelihood_loss() + config.a * pair.sigmoid_loss(config.beta * pair.margin())


@dataclass(frozen=True)
class DPOShiftConfig:
    beta: float
    """Strength of the pull to the reference, > 0; the paper's 0.01."""
    f: float
    """Factor on the rejected side's log-ratio, in (0, 1]; 1 is dpo. The paper's constant f, 0.95."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require(self, "f", 0 < self.f <= 1, "greater than 0 and at most 1")


@objective("dpo_shift", DPOShiftConfig, needs_reference=True)
def dpo_shift(pair: PairLogProbs, config: DPOShiftConfig) -> Tensor:
    """-log sigmoid(beta (r_w - f r_l)), per pair (B,): d_l = f d_w. Yang et al. 2025 (arXiv 2502.07599)."""
    return pair.sigmoid_loss(config.beta * (pair.r_w - config.f * pair.r_l))


TOTAL_LENGTH = BatchStatistic(
    column=lambda pair: pair.len_w + pair.len_l,
    start=lambda mean_total_length: (mean_total_length,),
    advance=lambda state, mean: (mean,),
)
"""Mean of |y_w| + |y_l| over the global batch, in tokens; the first step takes its own."""


@dataclass(frozen=True)
class ACPOConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""
    delta: float
    """Target reward margin per token of both responses, >= 0."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require_not_negative(self, "delta")


@objective("acpo", ACPOConfig, needs_reference=True, statistics=(TOTAL_LENGTH,))
def acpo(pair: PairLogProbs, config: ACPOConfig) -> Tensor:
    """-log sigmoid(beta r_w - k beta r_l), per pair (B,), with k detached: asymmetric constraint on the
    rejected side.

    k = 1 where r_l >= 0, else clip((tau - beta r_w) / (-beta r_l), 0, 1): no more push than reaches the
    target tau = delta * mean(|y_w| + |y_l|), a number from the previous step's global batch. Since k is held
    constant in the gradient, d_l = k d_w. Huang et al. 2026 (arXiv 2603.22165): its abstract says that a
    coefficient that knows lengths scales the rejected reward alone, towards a target; a review has
    k = (r_w - tau) / r_l with tau = delta (|y_w| + |y_l|). The paper's own equations were not to be had:
    the clipping, the branch r_l >= 0, the previous step's mean, delta and beta are choices made here.
    """
    beta_r_w, beta_r_l = config.beta * pair.r_w, config.beta * pair.r_l
    tau = config.delta * pair.state[0]
    tiny = torch.finfo(beta_r_l.dtype).tiny
    scale = ((tau - beta_r_w) / (-beta_r_l).clamp(min=tiny)).clamp(0, 1)
    scale = torch.where(beta_r_l >= 0, torch.ones_like(scale), scale).detach()
    return pair.sigmoid_loss(beta_r_w - scale * beta_r_l)
