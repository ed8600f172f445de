"""The config of what is measured beside training and where it is sent. `rcpo.config.schema` has it as
sections; defaults stand in conf/."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rcpo.common.conf import IN_CONF, defaults_in
from rcpo.config.types import STRICT, NonNegative, Positive, Text


@dataclass(frozen=True, config=STRICT)
@defaults_in("tracking/wandb")
class TrackingConfig:
    name: Literal["wandb", "tensorboard", "trackio", "none"]
    mode: Literal["auto", "online", "offline", "disabled"] = IN_CONF
    """Of W&B. auto: online where an API key is configured, else offline."""
    project: Text = IN_CONF
    entity: Text | None = IN_CONF
    group: Text | None = IN_CONF
    tags: list[Text] = IN_CONF
    """Beside the four that every run gets: objective, calibration, model, data."""
    log_model: bool = IN_CONF
    """Send final/ as an artifact at the end of the run."""
    alert_below: float | None = IN_CONF
    """Warn once in a run, on the console and by an alert of W&B or Trackio, when eval/displacement/chosen
    falls below this, in nats; null: never."""


@dataclass(frozen=True, config=STRICT)
@defaults_in("config metrics")
class MetricsConfig:
    geometry_every: NonNegative = IN_CONF
    """Measure scores and band (calibration.scope, calibration.estimator) every k steps even where calibration
    does not ask for it; 0: do not."""
    population: bool = IN_CONF
    """Also estimate cosine, centre and slack of the population, with intervals, from products between all
    pairs of measurements so far: 2 P/N more fp32 numbers per rank."""
    answers: Annotated[int, Field(ge=0, le=100)] = IN_CONF
    """At each evaluation the answers to the first so many held-out prompts, token by token the likeliest,
    beside those of the start: in RUN/answers.jsonl, the log, the tracker and rcpo compare --html; 0: none."""
    answer_tokens: Positive = IN_CONF
    """Tokens of an answer, at most."""
    vision_gain: Literal["others", "blank", "both", "none"] = IN_CONF
    """Whether a model that sees still looks: at each evaluation one more pass over the held-out pairs, with
    one another's images (others: vision_gain), with grey ones of the same sizes (blank: vision_gain_blank),
    or one of each (both); none: no such pass. Runs of text have none."""
