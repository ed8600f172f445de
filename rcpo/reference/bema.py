"""Weights that average a policy's: BEMA, the bias-corrected exponential moving average (Block and Zhang 2025,
arXiv 2508.00180).

    beta_t = (lag + t)^(-power),  alpha_t = (lag + t)^(-bias)
    EMA_t  = EMA + beta_t (theta_t - EMA)
    BEMA_t = EMA_t + alpha_t (theta_t - theta_0)

at optimizer step t, with theta_0 and the first EMA the weights of the start. Owns the formula and its
buffers, which are fp32 on the CPU; which steps are taken is `rcpo.reference.moving`'s, which calls this.
Lacks what TRL's callback has beside it: a factor of t, a least beta, and a burn-in.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Bema:
    """Of all parameters, by name; of those that `begin` was called for."""

    power: float
    bias: float
    lag: float
    start: dict[str, Tensor] = field(default_factory=dict)
    """theta_0."""
    ema: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, name: str, theta: Tensor) -> None:
        """With these weights of the start."""
        self.start[name] = theta.detach().float().to("cpu", copy=True)
        self.ema[name] = self.start[name].clone()

    def take(self, name: str, theta: Tensor, step: int) -> Tensor:
        """BEMA of this parameter, once it has taken in `theta`, the policy's after optimizer step `step`
        (counted from 1); fp32, on the CPU."""
        theta, age = theta.detach().float().cpu(), self.lag + step
        ema = self.ema[name].lerp_(theta, age**-self.power)
        return ema + age**-self.bias * (theta - self.start[name])

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in (*self.start.values(), *self.ema.values()))
