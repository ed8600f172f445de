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


def loss_and_incentives(objective: Objective, pair: PairLogProbs) -> LossAndIncentives:
    """Evaluate the objective on detached leaves; returns loss and incentives, each (B,) and detached.

    The pairs of a batch do not interact, so the gradient of the summed loss holds each pair's own derivative.
    """
    z_w = pair.z_w.detach().requires_grad_()
    z_l = pair.z_l.detach().requires_grad_()
    with torch.enable_grad():
        loss = objective(pair._replace(z_w=z_w, z_l=z_l))
        grad_w, grad_l = torch.autograd.grad(
            loss.sum(), (z_w, z_l), allow_unused=True, materialize_grads=True
        )
    return LossAndIncentives(loss.detach(), Incentives(-grad_w, grad_l))


def incentives(objective: Objective, pair: PairLogProbs) -> Incentives:
    """d_w = -dL/dz_w, d_l = +dL/dz_l, each (B,). arXiv 2604.18239, section on the incentive-score
    decomposition."""
    return loss_and_incentives(objective, pair).incentives
