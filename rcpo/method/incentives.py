"""Incentives: how hard an objective pulls the chosen response up and pushes the rejected one down.

Always from autograd on the objective with z as leaves, never hand-written. Called by `rcpo.training.step`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rcpo.objectives import Objective, PairLogProbs


class Incentives(NamedTuple):
    """d_w = -dL/dz_w and d_l = +dL/dz_l, per pair (B,), so that grad L = -d_w grad z_w + d_l grad z_l."""

    d_w: Tensor
    d_l: Tensor


class LossAndIncentives(NamedTuple):
    loss: Tensor
    """(B,), detached."""
    incentives: Incentives


class Derivatives(NamedTuple):
    """`LossAndIncentives`, and -dL by the log-probability of a text beside the two responses
    (`PairLogProbs.likely`), (B,); None where there is none."""

    loss: Tensor
    incentives: Incentives
    likely: Tensor | None


def loss_and_incentives(objective: Objective, pair: PairLogProbs) -> LossAndIncentives:
    """Evaluate the objective on detached leaves; returns loss and incentives, each (B,) and detached."""
    loss, incentives, _ = derivatives(objective, pair)
    return LossAndIncentives(loss, incentives)


def derivatives(objective: Objective, pair: PairLogProbs) -> Derivatives:
    """The same, with that of a text beside.

    The pairs of a batch do not interact, so the gradient of the summed loss holds each pair's own derivative.
    """
    z_w = pair.z_w.detach().requires_grad_()
    z_l = pair.z_l.detach().requires_grad_()
    likely = () if pair.likely is None else (pair.likely.detach().requires_grad_(),)
    with torch.enable_grad():
        loss = objective(pair._replace(z_w=z_w, z_l=z_l, likely=likely[0] if likely else None))
        grad_w, grad_l, *rest = torch.autograd.grad(
            loss.sum(), (z_w, z_l, *likely), allow_unused=True, materialize_grads=True
        )
    return Derivatives(loss.detach(), Incentives(-grad_w, grad_l), -rest[0] if rest else None)


def incentives(objective: Objective, pair: PairLogProbs) -> Incentives:
    """d_w = -dL/dz_w, d_l = +dL/dz_l, each (B,). arXiv 2604.18239, section on the incentive-score
    decomposition."""
    return loss_and_incentives(objective, pair).incentives
