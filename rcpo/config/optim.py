"""The section `optim`: the optimizer and the learning rate over a run. Part of `rcpo.config.schema`."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rcpo.common.conf import IN_CONF, defaults_in
from rcpo.config.types import STRICT, NonNegative


@dataclass(frozen=True, config=STRICT)
@defaults_in("optim/adamw", "optim/sgd", "optim/adamw_8bit", "optim/rmsprop")
class OptimConfig:
    name: Literal["adamw", "sgd", "adamw_8bit", "rmsprop"]
    lr: Annotated[float, Field(gt=0)] | None = IN_CONF
    """Peak learning rate; null: 3e-4 for builtin:NAME, else 1e-6; ten times that with model.lora."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = IN_CONF
    """AdamW's two decay rates."""
    eps: Annotated[float, Field(gt=0)] = IN_CONF
    """AdamW's and RMSprop's term in the denominator."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = IN_CONF
    """RMSprop's decay of the mean of squared gradients."""
    paged: bool = IN_CONF
    """Let the driver move adamw_8bit's moments to host memory while a GPU is full; one wait more a step."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = IN_CONF
    """SGD's momentum, and RMSprop's."""
    weight_decay: Annotated[float, Field(ge=0)] = IN_CONF
    """Decoupled for AdamW, plain L2 for sgd and rmsprop."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = IN_CONF
    """Learning rate after the warm-up: linear goes to 0, cosine to the floor; wsd stays, then goes there."""
    warmup_steps: NonNegative = IN_CONF
    """Optimizer steps of linear warm-up from 0 (wsd: from its floor)."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = IN_CONF
    """The same as a share of the run's steps, rounded up; null: as warmup_steps says."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = IN_CONF
    """Share of the run's steps, rounded up, in which wsd goes down along half a cosine."""
    floor: Annotated[float, Field(ge=0, lt=1)] = IN_CONF
    """What cosine and wsd leave of the peak at the end, as a share of it."""

    @property
    def first_decay(self) -> float:
        """Decay per step of what the optimizer remembers of gradients."""
        return self.momentum if self.name in ("sgd", "rmsprop") else self.betas[0]
