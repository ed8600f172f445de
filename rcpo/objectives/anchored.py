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


TOTAL_LENGTHS = {
    name: BatchStatistic(
        column=lambda pair: pair.len_w + pair.len_l,
        start=lambda mean_total_length: (mean_total_length,),
        advance=lambda state, mean: (mean,),
        of_lengths=name == "batch",
    )
    for name in ("batch", "previous")
}
"""Mean of |y_w| + |y_l| over a global batch, in tokens: the step's own, or that of the step before, of which
the first step takes its own."""


@dataclass(frozen=True)
class ACPOConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""
    delta: float
    """Target reward margin per token of both responses, >= 0."""
    tau: str
    """Whose lengths make the target tau. pair: each pair's own. batch: the mean over the step's global batch.
    previous: that of the step before."""
    max_scale: float
    """Largest k, > 0; 1: never more push than dpo's."""
    risen: str
    """k where the rejected response is at least as likely as before, r_l >= 0. full: max_scale. formula: that
    of the formula, which is 0 until the chosen reward is beyond tau; at r_l = 0 it stays max_scale."""

    def __post_init__(self) -> None:
        require_positive(self, "beta", "max_scale")
        require_not_negative(self, "delta")
        require(self, "tau", self.tau in ("pair", *TOTAL_LENGTHS), "pair, batch or previous")
        require(self, "risen", self.risen in ("full", "formula"), "full or formula")


def _total_length(config: ACPOConfig) -> tuple[BatchStatistic, ...]:
    return () if config.tau == "pair" else (TOTAL_LENGTHS[config.tau],)


@objective("acpo", ACPOConfig, needs_reference=True, statistics=_total_length)
def acpo(pair: PairLogProbs, config: ACPOConfig) -> Tensor:
    """-log sigmoid(beta r_w - k beta r_l), per pair (B,), with k detached: asymmetric constraint on the
    rejected side.

    k = max_scale where r_l >= 0, else clip((tau - beta r_w) / (-beta r_l), 0, max_scale): no more push than
    reaches the target tau = delta * mean(|y_w| + |y_l|). Since k is held constant in the gradient,
    d_l = k d_w. Huang et al. 2026 (arXiv 2603.22165), whose own equations were not to be had. Known:

        abstract    a coefficient that knows lengths scales the rejected reward alone, towards a target
        a review    k = (r(y_w) - tau_batch) / r(y_l), and tau(y_w, y_l) = delta (|y_w| + |y_l|); the name
                    tau_batch suggests a mean over the step's batch (tau=batch); without it (k = 1) POPE falls

    Choices made here: the clipping (max_scale), the branch r_l >= 0 (risen), from which batch tau is (tau),
    delta and beta. No auxiliary loss is known of.
    """
    beta_r_w, beta_r_l = config.beta * pair.r_w, config.beta * pair.r_l
    tau = config.delta * (pair.state[0] if pair.state else pair.len_w + pair.len_l)
    tiny = torch.finfo(beta_r_l.dtype).tiny
    scale = ((tau - beta_r_w) / (-beta_r_l).clamp(min=tiny)).clamp(0, config.max_scale)
    risen = torch.full_like(scale, config.max_scale)
    if config.risen == "formula":
        above = ((beta_r_w - tau) / beta_r_l.clamp(min=tiny)).clamp(0, config.max_scale)
        risen = torch.where(beta_r_l > 0, above, risen)
    scale = torch.where(beta_r_l >= 0, risen, scale).detach()
    return pair.sigmoid_loss(beta_r_w - scale * beta_r_l)
