"""Incentives d_w and d_l of an objective, by autograd: `rcpo.method.incentives` under its public name."""

from rcpo.method.incentives import Incentives, incentives

__all__ = ["Incentives", "incentives"]
