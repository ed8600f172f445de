"""The config of calibration: types, ranges and meanings. `rcpo.config.schema` has it as a section; defaults
stand in conf/calibration/."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rcpo.common.conf import IN_CONF, defaults_in
from rcpo.config.types import STRICT, NonNegative, Positive


@dataclass(frozen=True, config=STRICT)
@defaults_in("calibration/feedback feedback")
class FeedbackConfig:
    gain: Annotated[float, Field(ge=0, le=1)] = IN_CONF
    """log alpha per nat of smoothed displacement below the target, for as long as it lies there."""
    integral_gain: Annotated[float, Field(ge=0, le=1)] = IN_CONF
    """Lasting change of log alpha per nat below the target and optimizer step."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = IN_CONF
    """Decay of the moving average of measurements, per optimizer step."""
    target: float = IN_CONF
    """Mean change of the chosen log-probability to hold, in nats."""
    low: float = IN_CONF
    """Lower limit of log alpha."""
    high: float | None = IN_CONF
    """Upper limit of log alpha; null: max_log_alpha."""
    source: Literal["batch", "probe"] = IN_CONF
    """batch: the training batches of the first pass, whose pairs are still new, then the probe. probe:
    held-out pairs."""
    every: Positive = IN_CONF
    """Optimizer steps from one probe of the held-out pairs to the next."""
    pairs: Positive = IN_CONF
    """Pairs of a probe: the first of the held-out ones."""


@dataclass(frozen=True, config=STRICT)
@defaults_in("calibration/balance balance")
class BalanceConfig:
    limit: Annotated[float, Field(gt=0, le=3)] = IN_CONF
    """Limit of |log alpha|, to both sides; limited steps are counted in calibration/clamped."""
    every: Positive = IN_CONF
    """Optimizer steps from one probe of the held-out pairs to the next, from step 30 on; 2 at most
    before that."""
    pairs: Positive = IN_CONF
    """Pairs of a probe: the first of the held-out ones."""


@dataclass(frozen=True, config=STRICT)
@defaults_in("calibration/on")
class CalibrationConfig:
    name: Literal["off", "on", "exact", "feedback", "balance", "published", "fixed"]
    """off: plain training. on: reward calibration as in arXiv 2604.18239. exact: the same on the two real
    halves of the gradient. feedback: steers alpha by the chosen responses' displacement. balance: by the
    middle of both sides. published: the protocol of the paper's published code, alpha per micro-batch and
    rank. fixed: alpha as given."""
    scope: Literal["head", "lora_last", "full"] | None = IN_CONF
    """Parameters whose score vectors are compared. head: the output projection, through the head path.
    lora_last: the adapters of the last transformer block. full: all that are trained. null: lora_last where
    an adapter trains, else head."""
    estimator: Literal["mean", "weighted"] = IN_CONF
    """mean: r = mean(d_w)/mean(d_l) and scores of the mean log-probabilities (the paper's). weighted: the two
    halves G_w = mean(d_w s_w) and G_l = mean(d_l s_l) of the real gradient."""
    ema_beta: Annotated[float, Field(ge=0, lt=1)] = IN_CONF
    """Decay of the EMA of log ratio and band centre, per optimizer step; the paper's 0.98. published: per
    micro-batch."""
    max_log_alpha: Annotated[float, Field(gt=0, le=20)] = IN_CONF
    """Limit of |log alpha|; limited steps are counted in calibration/clamped."""
    every: Positive = 1  # conf/ has 8 for those that measure; metrics.geometry_every counts for the others
    """Optimizer steps from one measurement to the next."""
    warmup_steps: NonNegative = 0  # conf/ has 50; none before there was the key
    """Optimizer steps at the start that are all measured, so that the first averages are not of two or three
    batches."""
    alpha: Annotated[float, Field(gt=0)] = 1.0  # conf/ has ??? for fixed, and nothing for the others
    """The constant alpha of fixed."""
    feedback: FeedbackConfig = Field(default_factory=FeedbackConfig)
    balance: BalanceConfig = Field(default_factory=BalanceConfig)

    @property
    def probe_pairs(self) -> int:
        """How many of the held-out pairs calibration may steer by, the first of them."""
        pairs = {"balance": self.balance.pairs, "feedback": self.feedback.pairs}
        return pairs.get(self.name, 0)
