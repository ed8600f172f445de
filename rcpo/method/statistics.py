"""What a calibrator sees of one optimizer step.

Owns the type. `rcpo.method.metrics` makes it from the step's sums, `rcpo.method.calibrators` learn from it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from rcpo.method.scores import ScoreGeometry


class Probe(NamedTuple):
    """Mean displacement of the held-out probe pairs, in nats."""

    r_w: float
    r_l: float


@dataclass(frozen=True)
class StepStatistics:
    """What a calibrator may learn from one optimizer step; global-batch values, from before calibration."""

    mean_d_w: float
    mean_d_l: float
    geometry: ScoreGeometry | None
    """None where no score geometry was measured in this step."""
    mean_r_w: float = math.nan
    """Mean of z_w - ref_w over the global batch, before its update, in nats."""
    probe: Probe | None = None
    """Both sides of the held-out probe pairs, where the calibrator asked for them before this step."""
    lr_share: float = 1.0
    """The step's learning rate as a part of the peak, optim.lr."""

    @property
    def log_ratio(self) -> float | None:
        """log r = log(mean d_w / mean d_l), or None where a mean is not positive and finite."""
        if all(math.isfinite(mean) and mean > 0 for mean in (self.mean_d_w, self.mean_d_l)):
            return math.log(self.mean_d_w) - math.log(self.mean_d_l)
        return None
