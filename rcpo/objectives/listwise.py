"""Objectives of whole lists: several responses to one prompt, in an order or with scores.

A pair is a list of two. Responses with equal scores are not compared: none is pulled up or pushed down for
the other's sake. Each function gives every pair of the batch that belongs to a list that list's loss
(`PairLogProbs.of_lists`). Called through `rcpo.objectives.load_objective`.

Shape legend: B pairs of the batch, L lists, N responses of the longest list, best first.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpo.objectives.loss import Lists, PairLogProbs
from rcpo.objectives.parameters import require_not_negative, require_positive
from rcpo.objectives.registry import objective


def plackett_luce(x: Tensor, lists: Lists, beta: float, gamma: float = 0.0) -> Tensor:
    """sum_k log(1 + sum_{j worse than k} e^(beta (x_j - x_k) + gamma)) of x (L, N), per list (L,).

    At gamma = 0 the negative log-likelihood of the order under Plackett and Luce: the best response is drawn
    from all by a softmax of beta x, the next one from those that are left, and so on. A response is compared
    with those that are worse than it, so that of equal scores neither is drawn before the other."""
    worse = lists.worse()
    has_worse = worse.any(2)
    apart = beta * (x[:, None, :] - x[:, :, None]) + gamma
    # A row without a worse response has no logsumexp, and no derivative of one.
    left = apart.masked_fill(~worse & has_worse[:, :, None], -math.inf).logsumexp(2)
    return (-F.logsigmoid(-left)).masked_fill(~has_worse, 0.0).sum(1)


def of_best(pair: PairLogProbs, lists: Lists) -> Tensor:
    """-z/|y| of each list's best response, (L,)."""
    return -lists.ranked(pair.z_w / pair.len_w, pair.z_l / pair.len_l)[:, 0]


@dataclass(frozen=True)
class PlackettLuceDPOConfig:
    beta: float
    """Strength of the pull to the reference, > 0; the paper's 0.1."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")


@objective("pl_dpo", PlackettLuceDPOConfig, needs_reference=True, listwise=True)
def pl_dpo(pair: PairLogProbs, config: PlackettLuceDPOConfig) -> Tensor:
    """-sum_k log(e^(beta r_k) / sum_{j >= k} e^(beta r_j)), r sorted best first, (B,): DPO of an order.

    Of two responses it is dpo. Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3. Equal scores are ours:
    the sum over j is then over k itself and what is worse than it."""
    lists = pair.as_lists()
    return pair.of_lists(plackett_luce(lists.ranked(pair.u_w, pair.u_l), lists, config.beta))


@dataclass(frozen=True)
class PlackettLuceSimPOConfig:
    beta: float
    """Scale of the per-token log-probs, > 0; simpo's 2."""
    gamma: float
    """Target margin to each worse response, >= 0; gamma itself, as in simpo."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require_not_negative(self, "gamma")


@objective("pl_simpo", PlackettLuceSimPOConfig, needs_reference=False, listwise=True)
def pl_simpo(pair: PairLogProbs, config: PlackettLuceSimPOConfig) -> Tensor:
    """sum_k log(1 + sum_{j worse than k} e^(beta (z_j/|y_j| - z_k/|y_k|) + gamma)), (B,): pl_dpo's order of
    simpo's rewards.

    Of two responses it is simpo. Not published: the margin gamma stands before each worse response, as simpo
    has it before the one."""
    lists = pair.as_lists()
    x = lists.ranked(pair.z_w / pair.len_w, pair.z_l / pair.len_l)
    return pair.of_lists(plackett_luce(x, lists, config.beta, config.gamma))


@dataclass(frozen=True)
class LireConfig:
    temperature: float
    """T > 0 of the softmax over the list, in nats of z."""
    sft_weight: float
    """Weight of the best response's likelihood, per token, >= 0."""

    def __post_init__(self) -> None:
        require_positive(self, "temperature")
        require_not_negative(self, "sft_weight")


@objective("lire", LireConfig, needs_reference=False, listwise=True)
def lire(pair: PairLogProbs, config: LireConfig) -> Tensor:
    """-sum_i P_i R_i + sft_weight (-z_best/|y_best|), P = softmax(z / T) over the list, R the scores, (B,).

    The expected score, with its sign changed, of a response drawn from the list by the policy. d_i = P_i (R_i
    - sum_j P_j R_j) / T: what is scored above the policy's mean is pulled up. Ranks count as their negatives,
    a pair's scores are 1 and 0. Zhu et al. 2024 (arXiv 2405.13516); objective.log_probs=mean has z/|y| in the
    softmax."""
    lists = pair.as_lists()
    logits = lists.ranked(pair.z_w, pair.z_l) / config.temperature
    shares = logits.masked_fill(~lists.there, -math.inf).softmax(1)
    loss = -(shares * lists.scores.to(shares.dtype)).sum(1)
    return pair.of_lists(loss + config.sft_weight * of_best(pair, lists))


@dataclass(frozen=True)
class RRHFConfig:
    rank_weight: float
    """Weight of the comparisons, >= 0; 1 is the paper's formula."""
    sft_weight: float
    """Weight of the best response's likelihood, >= 0; 1 is the paper's formula."""

    def __post_init__(self) -> None:
        require_not_negative(self, "rank_weight", "sft_weight")


@objective("rrhf", RRHFConfig, needs_reference=False, listwise=True)
def rrhf(pair: PairLogProbs, config: RRHFConfig) -> Tensor:
    """rank_weight sum_{i better than j} max(0, p_j - p_i) + sft_weight (-p_best), p = z/|y|, (B,).

    Yuan et al. 2023 (arXiv 2304.05302), eq. 2 to 4. The published code divides the likelihood by the tokens
    of prompt, response and padding; this by those of the response."""
    lists = pair.as_lists()
    p = lists.ranked(pair.z_w / pair.len_w, pair.z_l / pair.len_l)
    wrong = torch.relu(p[:, None, :] - p[:, :, None]).masked_fill(~lists.worse(), 0.0)
    loss = config.rank_weight * wrong.sum((1, 2)) + config.sft_weight * of_best(pair, lists)
    return pair.of_lists(loss)
