"""Objectives that compare distributions rather than pairs: sorted numbers of the global batch, rank by rank.

Called through `rcpo.objectives.load_objective`. A step sorts once, over all its pairs and before its first
micro-batch (`rcpo.training.step`), so that the loss does not depend on how the batch is split.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rcpo.objectives.loss import PairLogProbs
from rcpo.objectives.parameters import require_positive
from rcpo.objectives.registry import objective


@dataclass(frozen=True)
class TransportConfig:
    beta: float
    """Strength of the pull to the reference, > 0."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")


def at_rank_of(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` (B,) the number of `others` (B,) that has its rank; equal values keep their
    order."""
    order = torch.argsort(values, stable=True)
    return torch.empty_like(others).scatter(0, order, others.sort().values)


def margins_of_reference(pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """ref_w - ref_l at the rank of z_w - z_l, the same for both sides."""
    quantile = at_rank_of(pairs.z_w - pairs.z_l, pairs.ref_w - pairs.ref_l)
    return quantile, quantile


@objective("aot", TransportConfig, needs_reference=True, match=margins_of_reference)
def aot(pair: PairLogProbs, config: TransportConfig) -> Tensor:
    """-log sigmoid(beta (m - q)), q = the reference's margin at m's rank in the batch, per pair (B,).

    Alignment by optimal transport: the policy's margins are to dominate the reference's, quantile by
    quantile. Melnyk et al. 2024 (arXiv 2406.05882), paired.
    """
    assert pair.partners is not None
    quantile, _ = pair.partners
    return pair.sigmoid_loss(config.beta * (pair.z_w - pair.z_l - quantile))


def ratios_of_other_side(pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """r_l at the rank of r_w, and r_w at the rank of r_l."""
    return at_rank_of(pairs.r_w, pairs.r_l), at_rank_of(pairs.r_l, pairs.r_w)


@objective("aot_unpaired", TransportConfig, needs_reference=True, match=ratios_of_other_side)
def aot_unpaired(pair: PairLogProbs, config: TransportConfig) -> Tensor:
    """-1/2 [log sigmoid(beta (r_w - q_l)) + log sigmoid(beta (q_w - r_l))], q at r's rank on the other side.

    One number per pair (B,); its mean over the batch is that of -log sigmoid(beta (r_w - r_l)) over the ranks
    of both sides. Each rank's loss counts half for the pair of either side, and pulls both in full:
    derivatives are those of the batch's loss. Melnyk et al. 2024 (arXiv 2406.05882), unpaired.
    """
    assert pair.partners is not None
    of_chosen = pair.sigmoid_loss(config.beta * (pair.r_w - pair.partners[0]))
    of_rejected = pair.sigmoid_loss(config.beta * (pair.partners[1] - pair.r_l))
    both = of_chosen + of_rejected
    return both - both.detach() / 2
