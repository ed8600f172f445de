"""Objectives that judge each side by itself against the reference, some with a batch statistic as the
reference point.

Of a pair the losses of both sides are added, of a single answer there is one (apo_down couples them, and
takes pairs alone). Called through `rcpo.objectives.load_objective`.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rcpo.objectives.loss import BatchStatistic, PairLogProbs
from rcpo.objectives.numerics import sigmoid
from rcpo.objectives.parameters import require, require_not_negative, require_positive
from rcpo.objectives.registry import objective


def mean_displacement(pair: PairLogProbs) -> Tensor:
    """(r_w + r_l)/2, (B,): the mean over both sides, or r of the one that is there."""
    if pair.present is None:
        return (pair.r_w + pair.r_l) / 2
    has_w, has_l = pair.present
    return (has_w * pair.r_w + has_l * pair.r_l) / (has_w + has_l)


@dataclass(frozen=True)
class PointwiseConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")


@dataclass(frozen=True)
class KTOConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""
    kl: str
    """What the reference point z0 is the mean of. mean: r of both sides, of the step before, at no cost.
    mismatched: as published, r of each prompt with the responses of another pair of the step's batch, which
    takes a forward pass of policy and reference."""
    chosen_weight: float
    """What multiplies the chosen side's loss, >= 0; the paper's lambda_D, 1."""
    rejected_weight: float
    """What multiplies the rejected side's loss, >= 0; the paper's lambda_U, 1."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require_not_negative(self, "chosen_weight", "rejected_weight")
        require(self, "kl", self.kl in KTO_REFERENCE_POINTS, "mean or mismatched")


KTO_REFERENCE_POINTS = {
    name: BatchStatistic(
        column=mean_displacement,
        start=lambda mean_total_length: (0.0,),
        advance=lambda state, mean: (max(0.0, mean),),
        of_mismatched=name == "mismatched",
    )
    for name in ("mean", "mismatched")
}
"""z0 = max(0, mean of r over both sides of a global batch), in nats: of the pairs of the step before (0 at
the first step), or of this step's mismatched pairs."""


def _reference_point(config: KTOConfig) -> tuple[BatchStatistic, ...]:
    return (KTO_REFERENCE_POINTS[config.kl],)


@objective("kto", KTOConfig, needs_reference=True, statistics=_reference_point)
def kto(pair: PairLogProbs, config: KTOConfig) -> Tensor:
    """a_w (1 - sigmoid(beta (r_w - z0))) + a_l (1 - sigmoid(beta (z0 - r_l))), per pair (B,): KTO on pairs.

    a_w and a_l are chosen_weight and rejected_weight. z0 is a number of the global batch, without a gradient.
    kl=mismatched is the paper's estimate of KL(policy, reference): max(0, mean of r over x_i with both
    responses of pair i+1, cyclic), under the step's own weights. kl=mean is a variant that costs nothing:
    max(0, mean of r over both sides) of the step before. Ethayarajh et al. 2024 (arXiv 2402.01306).
    """
    (z0,) = pair.state
    of_chosen = config.chosen_weight * sigmoid(-config.beta * (pair.r_w - z0))
    return pair.add_sides(of_chosen, config.rejected_weight * sigmoid(-config.beta * (z0 - pair.r_l)))


def _running_mean(state: tuple[float, ...], mean: float) -> tuple[float, ...]:
    average, count = state
    return average + (mean - average) / (count + 1), count + 1


@dataclass(frozen=True)
class BCOConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""
    shift: str
    """running_mean: d is the mean of beta r over both sides of all steps so far. none: d is 0."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require(self, "shift", self.shift in ("running_mean", "none"), "running_mean or none")


BCO_SHIFT = BatchStatistic(
    column=mean_displacement,
    start=lambda mean_total_length: (0.0, 0.0),
    advance=_running_mean,
)
"""(running mean of r over both sides in nats, optimizer steps in it); d = beta times the first."""


def _shift_of(config: BCOConfig) -> tuple[BatchStatistic, ...]:
    return (BCO_SHIFT,) if config.shift == "running_mean" else ()


@objective("bco", BCOConfig, needs_reference=True, statistics=_shift_of)
def bco(pair: PairLogProbs, config: BCOConfig) -> Tensor:
    """-log sigmoid(beta r_w - d) - log sigmoid(-(beta r_l - d)), per pair (B,), d = running mean of both beta
    r.

    d weighs the global batches of all optimizer steps so far alike, and is 0 at the first; with shift=none it
    is 0 throughout. Jung et al. 2024
    (arXiv 2404.04656); without the paper's density-ratio weights, which need unpaired data.
    """
    shift = config.beta * pair.state[0] if pair.state else 0.0
    of_chosen = pair.sigmoid_loss(config.beta * pair.r_w - shift)
    return pair.add_sides(of_chosen, pair.sigmoid_loss(-(config.beta * pair.r_l - shift)))


@objective("apo_zero", PointwiseConfig, needs_reference=True)
def apo_zero(pair: PairLogProbs, config: PointwiseConfig) -> Tensor:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l), per pair (B,): chosen up, rejected down.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    """
    return pair.add_sides(sigmoid(-config.beta * pair.r_w), sigmoid(config.beta * pair.r_l))


@objective("apo_down", PointwiseConfig, needs_reference=True)
def apo_down(pair: PairLogProbs, config: PointwiseConfig) -> Tensor:
    """sigmoid(beta r_w) + 1 - sigmoid(beta mt), per pair (B,): both down, the rejected one more.

    For models that are better than the chosen responses already; d_w is below zero once mt is large.
    D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    """
    return sigmoid(config.beta * pair.r_w) + sigmoid(-config.beta * (pair.r_w - pair.r_l))


@dataclass(frozen=True)
class NCAConfig:
    beta: float
    """Strength of the pull to the reference, > 0; the paper's 0.01."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")


@objective("nca", NCAConfig, needs_reference=True)
def nca(pair: PairLogProbs, config: NCAConfig) -> Tensor:
    """-log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w) - 1/2 log sigmoid(-beta r_l), per pair (B,).

    Noise contrastive alignment with one chosen and one rejected response. Chen et al. 2024 (arXiv
    2402.05369).
    """
    beta_r_w, beta_r_l = config.beta * pair.r_w, config.beta * pair.r_l
    of_chosen = -F.logsigmoid(beta_r_w) - 0.5 * F.logsigmoid(-beta_r_w)
    return pair.add_sides(of_chosen, -0.5 * F.logsigmoid(-beta_r_l))


@dataclass(frozen=True)
class SPPOConfig:
    beta: float
    """Inverse of twice the log-ratio that each side is to reach, > 0; the paper's 1e-3 (targets +-500
    nats)."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")


@objective("sppo", SPPOConfig, needs_reference=True)
def sppo(pair: PairLogProbs, config: SPPOConfig) -> Tensor:
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2, per pair (B,). Wu et al. 2024 (arXiv 2405.00675), hard
    labels."""
    target = 1 / (2 * config.beta)
    return pair.add_sides((pair.r_w - target) ** 2, (pair.r_l + target) ** 2)
