"""Reward calibration: one alpha per optimizer step that moves the incentive ratio to the centre of its band.

All kinds share one interface: `alpha()` before the step, `update(statistics)` after it, `state_dict()`. `off`
is a null object. Owns the band formulas and the EMA; does not own where the statistics come from
(`rcpo.training.step` measures them for the global batch, so alpha is the same on every rank and for every
split into micro-batches). One kind, `rcpo.method.published`, has an alpha per micro-batch and rank instead.

Source: arXiv 2604.18239. README.md of this room has a table of what is done otherwise than in the published
code, each on purpose.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from rcpo.config.calibration import CalibrationConfig
from rcpo.method.balance import BalanceCalibration
from rcpo.method.band import disentanglement_band
from rcpo.method.incentives import Incentives
from rcpo.method.per_step import PerStep
from rcpo.method.published import PublishedCalibration
from rcpo.method.scores import ScoreGeometry
from rcpo.method.statistics import Probe, StepStatistics

__all__ = [
    "BalanceCalibration",
    "BandCalibration",
    "Calibrator",
    "FeedbackCalibration",
    "FixedCalibration",
    "Probe",
    "PublishedCalibration",
    "StepStatistics",
    "build_calibrator",
]


class Calibrator(Protocol):
    """Decides alpha: d_w becomes alpha d_w, d_l becomes d_l / alpha; product and loss value stay."""

    @property
    def per_micro_batch(self) -> bool:
        """Whether every micro-batch of every rank has an alpha of its own; `PerStep` says what else that
        means."""

    @property
    def steers_by_batches(self) -> bool:
        """Whether the displacement r = z - ref of training batches steers it, so that they need a
        reference."""

    def measures_at(self, step: int) -> bool:
        """Whether this calibrator asks for score geometry in optimizer step `step` (counted from 0)."""

    def probes_at(self, step: int) -> bool:
        """Whether it asks for the displacement of the held-out probe pairs before optimizer step `step`."""

    def alpha(self) -> float:
        """The factor for the next step."""

    def begin(self) -> None:
        """A step begins; what one that was given up has left is forgotten."""

    def alpha_of(self, incentives: Incentives, geometry: ScoreGeometry | None) -> float:
        """The factor of one micro-batch with these incentives (B,), and this geometry where every micro-batch
        is measured: the step's."""

    def of_rank(self, num_ranks: int) -> dict[str, float]:
        """This rank's share of `calibration/*` that differ between ranks, to be summed over them."""

    def update(self, statistics: StepStatistics) -> None:
        """Take in what the step showed: the one place where state changes."""

    def metrics(self) -> dict[str, float]:
        """`calibration/*` state that made the current alpha."""

    def counts(self) -> dict[str, float]:
        """`calibration/*` counts of what was skipped or limited so far."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class FixedCalibration(PerStep):
    """alpha constant: the static baseline, and at 1 plain training. Learns nothing, measures nothing."""

    value: float = 1.0

    def alpha(self) -> float:
        return self.value

    def update(self, statistics: StepStatistics) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class BandCalibration(PerStep):
    """alpha = exp(1/2 (EMA[center] - EMA[position])), clamped to exp(+-max_log_alpha); position is log r and
    center log r* for the estimator mean, log(|G_w| / |G_l|) and 0 for weighted, which gives the two halves
    equal norm.

    A measurement after k optimizer steps moves the EMA with beta = min(ema_beta^k, n/(n+1)), n counting the
    measurements so far: a plain running mean at first, which then looks back equally far whatever `every` is.
    alpha = 1 until the first one, so that step t uses measurements up to step t-1.

    Measured, embedded default, 150 steps, seeds 0-2, held-out chosen at the end of dpo / simpo / ipo with
    `on`: every step +.22 / +.41 / +.42 nats; every 8th after 50 +.40 / +.37 / +.39, and +.28 / +.30 / +.29
    where ema_beta counted per measurement. `exact` wants a longer memory, as its measurements scatter more:
    with ema_beta .98 one of nine runs ended at -.85.
    """

    ema_beta: float
    max_log_alpha: float
    every: int
    """Optimizer steps from one measurement to the next, once `warmup_steps` are over."""
    warmup_steps: int = 0
    """Optimizer steps at the start that are all measured."""
    num_updates: int = 0
    """Measurements that the EMA holds."""
    step: int = 0
    """Optimizer steps seen."""
    last_step: int = -1
    """The newest step whose measurement was used, or skipped."""
    position_ema: float = 0.0
    """EMA of the log ratio: of the position before calibration."""
    center_ema: float = 0.0
    """EMA of the band centre."""
    num_skipped: int = 0
    """Measured steps that left the EMA untouched: an incentive mean or a score not positive and finite."""
    num_clamped: int = 0
    """Steps whose alpha was limited by `max_log_alpha`."""

    def measures_at(self, step: int) -> bool:
        return step < self.warmup_steps or step % self.every == 0

    def _raw_log_alpha(self) -> float:
        return 0.5 * (self.center_ema - self.position_ema)

    def alpha(self) -> float:
        return math.exp(max(-self.max_log_alpha, min(self.max_log_alpha, self._raw_log_alpha())))

    def update(self, statistics: StepStatistics) -> None:
        self.num_clamped += abs(self._raw_log_alpha()) > self.max_log_alpha
        step, self.step = self.step, self.step + 1
        if statistics.geometry is None or not self.measures_at(step):
            return  # what only metrics.geometry_every asked for must not change the training
        num_steps, self.last_step = step - self.last_step, step
        log_ratio = statistics.log_ratio
        band = None if log_ratio is None else disentanglement_band(log_ratio, 1.0, statistics.geometry)
        if band is None or log_ratio is None:
            self.num_skipped += 1
            return
        beta = min(self.ema_beta**num_steps, self.num_updates / (self.num_updates + 1))
        self.position_ema = beta * self.position_ema + (1 - beta) * band.position
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

    _STATE = ("num_updates", "step", "last_step", "position_ema", "center_ema", "num_skipped", "num_clamped")


@dataclass
class FeedbackCalibration(PerStep):
    """Closed loop: a proportional-integral law holds the displacement r of pairs not trained on at `target`.

        e        <- smoothing^k e + (1 - smoothing^k) clip(r - target, -5, 5)    e = 0 at the start, as r is
        integral <- clip(integral - integral_gain k e, low, high)
        log alpha = clip(integral - gain e, low, high)

    r is the mean of r_w = z_w - ref_w, in nats; k optimizer steps have passed since the measurement before.
    While every pair of a batch is new to the run (its first `num_fresh_steps` optimizer steps), the batch
    mean is a held-out measurement, and each step gives one; after that, or always with `from_probe`, r is
    measured on held-out probe pairs before every `every`-th step. The measurement of step t moves alpha from
    step t+1 on. Needs no score geometry; rcpo's own, not of the paper.

    Departure from rcpo's first law, log alpha <- log alpha - .02 clip(r - target, -2, 2): displacement sums
    up what alpha did, so a law that sums up displacement swings about the target undamped. The proportional
    term damps it, and smoothing keeps one noisy batch from moving alpha: by at most gain (1 - smoothing) 5.
    Embedded default, dpo and simpo, seeds 0-2, 150 steps: held-out chosen at the end +.27 nats on average and
    +.13 at worst (first law +.12 and -.30), largest alpha 1.47 (1.96), accuracy .89 (.89); the dip of the
    first 50 steps is deeper, worst evaluations -1.4 on average (-1.3).
    """

    gain: float
    integral_gain: float
    smoothing: float
    target: float
    low: float
    high: float
    every: int
    num_fresh_steps: int
    from_probe: bool
    step: int = 0
    """Optimizer steps seen."""
    error: float = 0.0
    """e: the smoothed measurement above the target, in nats."""
    integral: float = 0.0
    """The part of log alpha that stays when the error is gone."""
    log_alpha: float = 0.0
    num_skipped: int = 0
    """Measurements that were not finite."""
    num_clamped: int = 0
    """Updates that `low` or `high` cut short."""
    last: float = math.nan
    """The newest measurement used."""

    @property
    def steers_by_batches(self) -> bool:
        return not self.from_probe

    def probes_at(self, step: int) -> bool:
        return (self.from_probe or step >= self.num_fresh_steps) and step % self.every == 0

    def alpha(self) -> float:
        return math.exp(self.log_alpha)

    def update(self, statistics: StepStatistics) -> None:
        is_fresh = not self.from_probe and self.step < self.num_fresh_steps
        probe = statistics.probe
        measured = statistics.mean_r_w if is_fresh else None if probe is None else probe.r_w
        self.step += 1
        if measured is None:
            return
        if not math.isfinite(measured):
            self.num_skipped += 1
            return
        self.last = measured
        num_steps = 1 if is_fresh else self.every
        kept = self.smoothing**num_steps
        self.error = kept * self.error + (1 - kept) * _limited(
            measured - self.target, -FEEDBACK_ERROR_NATS, FEEDBACK_ERROR_NATS
        )
        integral = self.integral - self.integral_gain * num_steps * self.error
        self.integral = _limited(integral, self.low, self.high)
        wanted = self.integral - self.gain * self.error
        self.log_alpha = _limited(wanted, self.low, self.high)
        self.num_clamped += self.integral != integral or self.log_alpha != wanted

    def metrics(self) -> dict[str, float]:
        return {} if math.isnan(self.last) else {"calibration/measured": self.last}

    def counts(self) -> dict[str, float]:
        return {"calibration/skipped": self.num_skipped, "calibration/clamped": self.num_clamped}

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self._STATE}
        return state | {"last": None if math.isnan(self.last) else self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, name, state[name])
        self.last = math.nan if state["last"] is None else state["last"]

    _STATE = ("step", "error", "integral", "log_alpha", "num_skipped", "num_clamped")


FEEDBACK_ERROR_NATS = 5.0
"""The most that one measurement counts: batch means of r_w are noisy."""


def _limited(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def build_calibrator(
    config: CalibrationConfig, num_fresh_steps: int = 0, momentum: float = 0.9
) -> Calibrator:
    """The calibrator that a config asks for, in a run whose first `num_fresh_steps` optimizer steps train on
    pairs that are new to it, and whose optimizer has this `momentum` (AdamW's first decay rate)."""
    if config.name in ("off", "fixed"):
        return FixedCalibration(config.alpha)
    if config.name == "published":
        return PublishedCalibration(config.ema_beta, config.max_log_alpha)
    if config.name == "balance":
        return BalanceCalibration(config.balance.limit, config.balance.every, momentum)
    if config.name == "feedback":
        feedback = config.feedback
        high = config.max_log_alpha if feedback.high is None else feedback.high
        return FeedbackCalibration(
            gain=feedback.gain,
            integral_gain=feedback.integral_gain,
            smoothing=feedback.smoothing,
            target=feedback.target,
            low=feedback.low,
            high=high,
            every=feedback.every,
            num_fresh_steps=num_fresh_steps,
            from_probe=feedback.source == "probe",
        )
    return BandCalibration(config.ema_beta, config.max_log_alpha, config.every, config.warmup_steps)
