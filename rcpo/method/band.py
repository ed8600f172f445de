"""The disentanglement band of one optimizer step. Source: arXiv 2604.18239."""

import math
from dataclasses import dataclass

from rcpo.method.scores import ScoreGeometry


@dataclass(frozen=True)
class Band:
    """The disentanglement band of one step in log-ratio units: inside it the chosen side rises and the
    rejected falls."""

    position: float
    """Where the step stood, after calibration. mean: log(alpha d_w / (d_l / alpha)); weighted: log(alpha
    |G_w| / (|G_l| / alpha))."""
    center: float
    """mean: log r* = log(|s_l| / |s_w|); weighted: 0, both halves of the gradient equally long."""
    half_width: float
    """-log rho; +inf where rho <= 0: every positive ratio is inside."""

    @property
    def lower(self) -> float:
        return self.center - self.half_width

    @property
    def upper(self) -> float:
        return self.center + self.half_width

    @property
    def slack(self) -> float:
        """half-width - |position - center|; >= 0 iff inside."""
        return self.half_width - abs(self.position - self.center)


def disentanglement_band(log_ratio: float, alpha: float, geometry: ScoreGeometry) -> Band | None:
    """The band of a step with incentive ratio log r before calibration by alpha, which adds 2 log alpha to
    the position.

    None where a side's vector is zero or not finite, so that no centre exists. arXiv 2604.18239.
    """
    rho = geometry.cosine
    if math.isnan(rho):
        return None
    log_norms = 0.5 * (math.log(geometry.rejected_squared) - math.log(geometry.chosen_squared))
    return Band(
        position=(-log_norms if geometry.weighted else log_ratio) + 2 * math.log(alpha),
        center=0.0 if geometry.weighted else log_norms,
        half_width=-math.log(rho) if rho > 0 else math.inf,
    )
