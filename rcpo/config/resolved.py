"""The config of a run once everything is decided: `Config` without the nulls that mean "rcpo decides".

`rcpo.config.resolve` makes it, RUN/config.yaml holds it, and what trains takes nothing else. Owns the
narrower types, and the objective built from its section once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from rcpo.config.schema import (
    STRICT,
    CalibrationConfig,
    Config,
    ModelConfig,
    NonNegative,
    OptimConfig,
    Positive,
    Stage,
    Text,
    TrainConfig,
)
from rcpo.config.validate import validate_as
from rcpo.objectives import Composition, Objective, composition_of, objective_of


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ResolvedCalibration(CalibrationConfig):
    scope: Literal["head", "lora_last", "full"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ResolvedModel(ModelConfig):
    dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ResolvedOptim(OptimConfig):
    lr: float


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ResolvedTrain(TrainConfig):
    """`steps` or `epochs` is set, and not both."""

    pairs_per_device: Positive
    eval_every: NonNegative
    device: Literal["cpu", "cuda"]

    def num_steps(self, steps_of: Callable[[float], int]) -> int:
        """Optimizer steps of the run; `steps_of` counts those of so many passes over its data."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise ValueError("neither steps nor epochs: rcpo.config.resolve sets one")
        return steps_of(self.epochs)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ResolvedConfig(Config):
    calibration: ResolvedCalibration
    model: ResolvedModel
    optim: ResolvedOptim
    train: ResolvedTrain
    name: Text
    run_dir: Text

    @property
    def zero_stage(self) -> Stage:
        """deepspeed.stage. It stays null for GPUs until `rcpo.launch.stage` has seen model, pairs and their
        memory; whoever starts an engine without that gets 1."""
        return 1 if self.deepspeed.stage is None else self.deepspeed.stage

    @functools.cached_property
    def objective_function(self) -> Objective:
        """The loss that the section `objective` names, with its parameters."""
        return objective_of(self.objective)

    @functools.cached_property
    def composition(self) -> Composition:
        """Weights of pairs and aggregate, of the same section."""
        return composition_of(self.objective)


def as_resolved(config: Config) -> ResolvedConfig:
    """`config` with its narrower type. Raises UserError where a null is left that later code would have to
    interpret."""
    return resolved_of(dataclasses.asdict(config))


def resolved_of(tree: dict[str, Any]) -> ResolvedConfig:
    """A frozen config from plain containers, as RUN/config.yaml holds it. Raises UserError for the first
    fault."""
    return validate_as(ResolvedConfig, tree)
