"""Objectives that are functions of the reference margin mt = r_w - r_l (r_dpo: and of the lengths).

At each pair d_w and d_l are equal (ipo, dpo_norm: up to the lengths), which is why these displace the chosen
response. Called through `rcpo.objectives.load_objective`.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rcpo.objectives.loss import PairLogProbs
from rcpo.objectives.numerics import exp_linear, sigmoid
from rcpo.objectives.parameters import require, require_not_negative, require_positive
from rcpo.objectives.registry import objective


def normalized_margin(pair: PairLogProbs) -> Tensor:
    """r_w/|y_w| - r_l/|y_l|, (B,)."""
    return pair.u_w / pair.len_w - pair.u_l / pair.len_l


@dataclass(frozen=True)
class DPOConfig:
    beta: float
    """Strength of the pull to the reference, > 0; the paper's 0.1."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")


@objective("dpo", DPOConfig, needs_reference=True)
def dpo(pair: PairLogProbs, config: DPOConfig) -> Tensor:
    """-log sigmoid(beta * (r_w - r_l)), per pair (B,), log-probs summed. Rafailov et al. 2023 (arXiv
    2305.18290)."""
    return pair.sigmoid_loss(config.beta * pair.margin())


@objective("ti_dpo", DPOConfig, needs_reference=True, weighs_tokens=True)
def ti_dpo(pair: PairLogProbs, config: DPOConfig) -> Tensor:
    """-log sigmoid(beta * mt) with r = sum_t omega_t (log p_t - log ref_t), per pair (B,).

    DPO on token-importance-weighted log-ratios, omega_t = 1 - p_t over its mean: what the policy finds likely
    already counts little. omega is detached, and its mean over a response is 1, so that equal weights give
    DPO; `rcpo.models.logprobs` weighs the tokens. The weights 1 - p are those of the code published with
    arXiv 2604.18239, which divides them by their sum: a mean over tokens, |y| times smaller than this one's
    sum. TI-DPO itself (Yang et al. 2025, arXiv 2505.19653) weighs by gradient attribution and adds a triplet
    loss, which this does not."""
    return dpo(pair, config)


@dataclass(frozen=True)
class NormalizedDPOConfig:
    beta: float
    """Scale of the per-token margin, > 0; Tulu 3's 5."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")


@objective("dpo_norm", NormalizedDPOConfig, needs_reference=True)
def dpo_norm(pair: PairLogProbs, config: NormalizedDPOConfig) -> Tensor:
    """-log sigmoid(beta * (r_w/|y_w| - r_l/|y_l|)), per pair (B,): DPO on averaged log-probs.

    Not DPO at another beta: the two sides' incentives differ by |y_l|/|y_w|. Lambert et al. 2024 (arXiv
    2411.15124).
    """
    return pair.sigmoid_loss(config.beta * normalized_margin(pair))


@dataclass(frozen=True)
class NoisyLabelConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""
    eps: float
    """Share of pairs whose labels are taken to be swapped, in [0, 0.5)."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require(self, "eps", 0 <= self.eps < 0.5, "at least 0 and less than 0.5")


@objective("cdpo", NoisyLabelConfig, needs_reference=True)
def cdpo(pair: PairLogProbs, config: NoisyLabelConfig) -> Tensor:
    """-(1-eps) log sigmoid(beta mt) - eps log sigmoid(-beta mt), per pair (B,): DPO with smoothed labels.

    Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO".
    """
    logit = config.beta * pair.margin()
    return -(1 - config.eps) * F.logsigmoid(logit) - config.eps * F.logsigmoid(-logit)


@objective("robust_dpo", NoisyLabelConfig, needs_reference=True)
def robust_dpo(pair: PairLogProbs, config: NoisyLabelConfig) -> Tensor:
    """[-(1-eps) log sigmoid(beta mt) + eps log sigmoid(-beta mt)] / (1 - 2 eps), per pair (B,).

    An unbiased estimate of DPO's loss under label noise; below zero for large margins. Chowdhury et al. 2024
    (arXiv 2403.00409).
    """
    logit = config.beta * pair.margin()
    noisy = -(1 - config.eps) * F.logsigmoid(logit) + config.eps * F.logsigmoid(-logit)
    return noisy / (1 - 2 * config.eps)


@dataclass(frozen=True)
class IPOConfig:
    tau: float
    """Regularisation, > 0; the target of the margin is 1/(2 tau)."""
    length_normalized: bool
    """Divide each side's log-ratio by its length (as the published code of the authors' later work does);
    false gives the paper's summed form."""

    def __post_init__(self) -> None:
        require_positive(self, "tau")


@objective("ipo", IPOConfig, needs_reference=True)
def ipo(pair: PairLogProbs, config: IPOConfig) -> Tensor:
    """(r_w/|y_w| - r_l/|y_l| - 1/(2 tau))^2, per pair (B,). Azar et al. 2023 (arXiv 2310.12036), eq. 17."""
    margin = normalized_margin(pair) if config.length_normalized else pair.margin()
    return (margin - 1 / (2 * config.tau)) ** 2


@dataclass(frozen=True)
class HingeConfig:
    beta: float
    """1/beta is the margin in nats beyond which a pair has no incentive, > 0."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")


@objective("hinge", HingeConfig, needs_reference=True)
def hinge(pair: PairLogProbs, config: HingeConfig) -> Tensor:
    """max(0, 1 - beta mt), per pair (B,): SLiC's hinge on DPO's margin. Liu et al. 2023, RSO (arXiv
    2309.06657)."""
    return F.relu(1 - config.beta * pair.margin())


@dataclass(frozen=True)
class EXOConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""
    eps: float
    """Label smoothing in (0, 1): the preference that the model is to match is 1 - eps; the paper's 1e-3."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require(self, "eps", 0 < self.eps < 1, "between 0 and 1")


@objective("exo", EXOConfig, needs_reference=True)
def exo(pair: PairLogProbs, config: EXOConfig) -> Tensor:
    """q (log q - log(1-eps)) + (1-q) (log(1-q) - log eps) with q = sigmoid(beta mt), per pair (B,).

    The reverse KL of the model's preference from the smoothed label. q, 1-q and their logs come from log
    sigmoid, so neither tail gives 0 * inf. Ji et al. 2024 (arXiv 2402.00856).
    """
    logit = config.beta * pair.margin()
    chosen = sigmoid(logit) * (F.logsigmoid(logit) - math.log1p(-config.eps))
    rejected = sigmoid(-logit) * (F.logsigmoid(-logit) - math.log(config.eps))
    return chosen + rejected


@dataclass(frozen=True)
class DiscoPOPConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""
    tau: float
    """Temperature of the switch between the two losses, in units of beta mt, > 0; the paper's 0.05."""

    def __post_init__(self) -> None:
        require_positive(self, "beta", "tau")


@objective("discopop", DiscoPOPConfig, needs_reference=True)
def discopop(pair: PairLogProbs, config: DiscoPOPConfig) -> Tensor:
    """(1-g) (-log sigmoid(beta mt)) + g e^(-beta mt) with g = sigmoid(beta mt / tau), per pair (B,).

    g e^(-beta mt) is one exponential, e^(log g - beta mt), linear beyond exponent 30, which only tau > 1 can
    reach. Lu et al. 2024 (arXiv 2406.08414), the loss called LRML.
    """
    logit = config.beta * pair.margin()
    switch = logit / config.tau
    return -sigmoid(-switch) * F.logsigmoid(logit) + exp_linear(F.logsigmoid(switch) - logit)


@dataclass(frozen=True)
class LengthRegularizedDPOConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""
    a: float
    """Weight of the length difference, logits per token, >= 0; the paper's alpha."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require_not_negative(self, "a")


@objective("r_dpo", LengthRegularizedDPOConfig, needs_reference=True)
def r_dpo(pair: PairLogProbs, config: LengthRegularizedDPOConfig) -> Tensor:
    """-log sigmoid(beta mt + a (|y_w| - |y_l|)), per pair (B,): a longer chosen response counts as won
    already.

    Park et al. 2024 (arXiv 2403.19159).
    """
    return pair.sigmoid_loss(config.beta * pair.margin() + config.a * pair.extra_tokens())
