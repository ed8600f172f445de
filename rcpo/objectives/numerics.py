"""Functions that stay finite, with finite derivatives, where the textbook form overflows or loses its last
digits.

Called by the families of `rcpo.objectives`; everything is elementwise and differentiable by autograd.
Extensions are tangent lines, so that a loss is C1 and incentives are continuous, and never a clamp, whose
incentive would be zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EXPONENT_LIMIT = 30.0
"""Where exp goes over into its tangent: e^30 = 1e13 squares to 1e26, so that norms of gradients stay within
fp32."""


def sigmoid(x: Tensor) -> Tensor:
    """1/(1 + e^-x) as exp(log sigmoid(x)): its derivative keeps its digits in both tails.

    torch.sigmoid's derivative y(1 - y) is exactly 0 in fp32 from x = 17 on, where y has rounded to 1.
    """
    return F.logsigmoid(x).exp()


def exp_linear(x: Tensor) -> Tensor:
    """e^x up to x = EXPONENT_LIMIT, and its tangent e^limit (1 + x - limit) beyond."""
    return x.clamp(max=EXPONENT_LIMIT).exp() * (1 + F.relu(x - EXPONENT_LIMIT))


def expm1_linear(x: Tensor) -> Tensor:
    """e^x - 1 to full precision near 0, with `exp_linear`'s tangent beyond EXPONENT_LIMIT."""
    inside = x.clamp(max=EXPONENT_LIMIT)
    return torch.expm1(inside) + inside.exp() * F.relu(x - EXPONENT_LIMIT)
