"""Reward calibration: one alpha per optimizer step that moves the incentive ratio to the centre of its band.

All kinds share one interface: `alpha()` before the step, `update(statistics)` after it, `state_dict()`. `off`
is a null object. Owns the band formulas and the EMA; does not own where the statistics come from (`rcpo.step`
measures them for the global batch, so alpha is the same on every rank and for every split into
micro-batches).

Source: arXiv 2604.18239. Departures from the published code, each on purpose: alpha once per optimizer step
from the global batch with lag one; EMA starts as a running mean; steps without a positive incentive mean are
skipped and counted; log alpha is clamped and the clamps are counted; rho <= 0 is reported as it is.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from rcpo.config.schema import CalibrationConfig
from rcpo.scores import ScoreGeometry


@dataclass(frozen=True)
class StepStatistics:
    """What a calibrator may learn from one optimizer step; global-batch values, from before calibration."""

    mean_d_w: float
    mean_d_l: float
    geometry: ScoreGeometry | None
    """None where no score geometry was measured in this step."""

    @property
    def log_ratio(self) -> float | None:
        """log r = log(mean d_w / mean d_l), or None where a mean is not positive and finite."""
        if all(math.isfinite(mean) and mean > 0 for mean in (self.mean_d_w, self.mean_d_l)):
            return math.log(self.mean_d_w) - math.log(self.mean_d_l)
        return None


@dataclass(frozen=True)
class Band:
    """The disentanglement band of one step in log-ratio units: inside it the chosen side rises and the
    rejected falls."""

    position: float
    """log(alpha d_w / (d_l / alpha)): where the step stood, after calibration."""
    center: float
    """log r* = log(|s_l| / |s_w|)."""
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
    """The band around log r* = log(|s_l|/|s_w|) with the position after calibration, log r + 2 log alpha.

    None where a score is zero or not finite, so that no centre exists. arXiv 2604.18239.
    """
    rho = geometry.cosine
    if math.isnan(rho):
        return None
    return Band(
        position=log_ratio + 2 * math.log(alpha),
        center=0.5 * (math.log(geometry.rejected_squared) - math.log(geometry.chosen_squared)),
        half_width=-math.log(rho) if rho > 0 else math.inf,
    )


class Calibrator(Protocol):
    """Decides alpha: d_w becomes alpha d_w, d_l becomes d_l / alpha; product and loss value stay."""

    def measures_at(self, step: int) -> bool:
        """Whether this calibrator asks for score geometry in optimizer step `step` (counted from 0)."""

    def alpha(self) -> float:
        """The factor for the next step."""

    def update(self, statistics: StepStatistics) -> None:
        """Take in what the step showed: the one place where state changes."""

    def metrics(self) -> dict[str, float]:
        """`calibration/*` state that made the current alpha."""

    def counts(self) -> dict[str, float]:
        """`calibration/*` counts of what was skipped or limited so far."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class NoCalibration:
    """alpha = 1 always: plain training."""

    def measures_at(self, step: int) -> bool:
        return False

    def alpha(self) -> float:
        return 1.0

    def update(self, statistics: StepStatistics) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def counts(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class BandCalibration:
    """alpha = exp(1/2 (EMA[log r*] - EMA[log r])), clamped to exp(+-max_log_alpha).

    The EMA advances once per measured step with beta_t = min(ema_beta, t/(t+1)), t counting the updates so
    far: a plain running mean at first. alpha = 1 until the first update, so that step t uses measurements up
    to step t-1.
    """

    ema_beta: float
    max_log_alpha: float
    every: int
    """Optimizer steps from one measurement to the next."""
    num_updates: int = 0
    position_ema: float = 0.0
    """EMA[log r], before calibration."""
    center_ema: float = 0.0
    """EMA[log r*]."""
    num_skipped: int = 0
    """Measured steps that left the EMA untouched: an incentive mean or a score not positive and finite."""
    num_clamped: int = 0
    """Steps whose alpha was limited by `max_log_alpha`."""

    def measures_at(self, step: int) -> bool:
        return step % self.every == 0

    def _raw_log_alpha(self) -> float:
        return 0.5 * (self.center_ema - self.position_ema)

    def alpha(self) -> float:
        return math.exp(max(-self.max_log_alpha, min(self.max_log_alpha, self._raw_log_alpha())))

    def update(self, statistics: StepStatistics) -> None:
        self.num_clamped += abs(self._raw_log_alpha()) > self.max_log_alpha
        if statistics.geometry is None:
            return
        log_ratio = statistics.log_ratio
        band = None if log_ratio is None else disentanglement_band(log_ratio, 1.0, statistics.geometry)
        if band is None or log_ratio is None:
            self.num_skipped += 1
            return
        beta = min(self.ema_beta, self.num_updates / (self.num_updates + 1))
        self.position_ema = beta * self.position_ema + (1 - beta) * log_ratio
        self.center_ema = beta * self.center_ema + (1 - beta) * band.center
        self.num_updates += 1

    def metrics(self) -> dict[str, float]:
        return {"calibration/position_ema": self.position_ema, "calibration/center_ema": self.center_ema}

    def counts(self) -> dict[str, float]:
        return {"calibration/skipped": self.num_skipped, "calibration/clamped": self.num_clamped}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, name, state[name])

    _STATE = ("num_updates", "position_ema", "center_ema", "num_skipped", "num_clamped")


def build_calibrator(config: CalibrationConfig) -> Calibrator:
    """The calibrator that a config asks for."""
    if config.name == "off":
        return NoCalibration()
    return BandCalibration(config.ema_beta, config.max_log_alpha, config.every)
