"""Preference objectives: one short function each, from a pair's log-probabilities to its loss.

Owns the formulas, their parameters (a frozen config beside each function) and the registry. Does not own gradients:
`rcpo.incentives` takes them from these functions by autograd, so a new objective is calibrated at once. To add one,
write a function here with `@objective(...)` and a `conf/objective/NAME.yaml` of the same name.

Shape legend: B pairs. z_w, z_l are log-probabilities *summed* over response tokens; r = z - ref; m = z_w - z_l.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from rcpo.errors import UserError


class PairLogProbs(NamedTuple):
    """What an objective sees of a batch of B pairs; every field is (B,) and floating point."""

    z_w: Tensor
    """log pi(y_w|x), summed over the chosen response's tokens, in nats."""
    z_l: Tensor
    """log pi(y_l|x), summed over the rejected response's tokens, in nats."""
    ref_w: Tensor
    """z_w under the frozen reference; zeros where the objective declares `needs_reference=False`."""
    ref_l: Tensor
    """z_l under the frozen reference."""
    len_w: Tensor
    """|y_w|, number of chosen response tokens, at least 1."""
    len_l: Tensor
    """|y_l|, number of rejected response tokens, at least 1."""

    def margin(self) -> Tensor:
        """(z_w - ref_w) - (z_l - ref_l), the implicit reward margin divided by beta, (B,)."""
        return (self.z_w - self.ref_w) - (self.z_l - self.ref_l)


LossFunction = Callable[[PairLogProbs, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """A registered loss with its parameters: call it with `PairLogProbs`, get the loss per pair (B,)."""

    name: str
    loss: LossFunction
    config: Any
    needs_reference: bool
    """Whether ref_w and ref_l enter the loss; where they do not, they are read for the metrics only."""

    def __call__(self, pair: PairLogProbs) -> Tensor:
        return self.loss(pair, self.config)

    def params(self) -> dict[str, Any]:
        """The parameters as a plain dict, with the keys of the YAML file."""
        return {config_key(name): value for name, value in dataclasses.asdict(self.config).items()}


@dataclass(frozen=True)
class _Entry:
    loss: LossFunction
    config_type: type
    needs_reference: bool


REGISTRY: dict[str, _Entry] = {}


def config_key(field_name: str) -> str:
    """The YAML key of a config field: Python's reserved words carry an underscore here (lambda_) and none there."""
    return field_name.removesuffix("_")


def objective(name: str, config_type: type, *, needs_reference: bool) -> Callable[[LossFunction], LossFunction]:
    """Register a loss function under `name`, which is also its YAML file's name and its test id."""

    def register(loss: LossFunction) -> LossFunction:
        if name in REGISTRY:
            raise ValueError(f"objective {name!r} is registered twice")
        REGISTRY[name] = _Entry(loss, config_type, needs_reference)
        return loss

    return register


def load_objective(name: str, **params: Any) -> Objective:
    """Return the objective `name` with `params` over its defaults.

    Raises UserError for an unknown name, an unknown parameter, a value of the wrong type or one outside its range.
    """
    if name not in REGISTRY:
        raise UserError(f"objective={name}: no such objective; choose one of {', '.join(sorted(REGISTRY))}")
    entry = REGISTRY[name]
    fields = {config_key(field.name): field for field in dataclasses.fields(entry.config_type)}
    for key, value in params.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean objective.{close[0]}?" if close else f"it has {', '.join(fields) or 'none'}"
            raise UserError(f"objective.{key}={value}: {name} has no such parameter; {hint}")
        wants_bool = isinstance(fields[key].default, bool)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (isinstance(value, bool) if wants_bool else is_number):
            kind = "true or false" if wants_bool else "a finite number"
            raise UserError(
                f"objective.{key}={value}: must be {kind}; type for example "
                f"objective.{key}={str(fields[key].default).lower()}"
            )
    try:
        config = entry.config_type(**{fields[key].name: value for key, value in params.items()})
    except ValueError as error:
        raise UserError(f"objective={name}: {error}") from None
    return Objective(name, entry.loss, config, entry.needs_reference)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(
                f"objective.{name}={getattr(config, name)}: must be greater than 0; type objective.{name}=0.1"
            )


@dataclass(frozen=True)
class SFTConfig:
    """No parameters."""


@objective("sft", SFTConfig, needs_reference=False)
def sft(pair: PairLogProbs, config: SFTConfig) -> Tensor:
    """-z_w / |y_w|, per pair (B,): maximum likelihood of the chosen response, a mean over its tokens."""
    return -pair.z_w / pair.len_w


@dataclass(frozen=True)
class DPOConfig:
    beta: float = 0.1
    """Strength of the pull to the reference, > 0; the paper's 0.1."""

    def __post_init__(self) -> None:
        _require_positive(self, "beta")


@objective("dpo", DPOConfig, needs_reference=True)
def dpo(pair: PairLogProbs, config: DPOConfig) -> Tensor:
    """-log sigmoid(beta * (r_w - r_l)), per pair (B,), log-probs summed. Rafailov et al. 2023 (arXiv 2305.18290)."""
    return -F.logsigmoid(config.beta * pair.margin())


@dataclass(frozen=True)
class IPOConfig:
    tau: float = 0.1
    """Regularisation, > 0; the target of the margin is 1/(2 tau)."""
    length_normalized: bool = True
    """Divide each side's log-ratio by its length (as the published code of the authors' later work does);
    false gives the paper's summed form."""

    def __post_init__(self) -> None:
        _require_positive(self, "tau")


@objective("ipo", IPOConfig, needs_reference=True)
def ipo(pair: PairLogProbs, config: IPOConfig) -> Tensor:
    """(r_w/|y_w| - r_l/|y_l| - 1/(2 tau))^2, per pair (B,). Azar et al. 2023 (arXiv 2310.12036), eq. 17."""
    r_w, r_l = pair.z_w - pair.ref_w, pair.z_l - pair.ref_l
    if config.length_normalized:
        r_w, r_l = r_w / pair.len_w, r_l / pair.len_l
    return (r_w - r_l - 1 / (2 * config.tau)) ** 2


@dataclass(frozen=True)
class SimPOConfig:
    beta: float = 2.0
    """Scale of the per-token margin, > 0; the paper's range is 2 to 2.5."""
    gamma: float = 1.0
    """Target margin, >= 0. This is gamma itself, not the ratio gamma/beta that some tools call the margin."""

    def __post_init__(self) -> None:
        _require_positive(self, "beta")


@objective("simpo", SimPOConfig, needs_reference=False)
def simpo(pair: PairLogProbs, config: SimPOConfig) -> Tensor:
    """-log sigmoid(beta * (z_w/|y_w| - z_l/|y_l|) - gamma), per pair (B,). Meng et al. 2024 (arXiv 2405.14734)."""
    margin = pair.z_w / pair.len_w - pair.z_l / pair.len_l
    return -F.logsigmoid(config.beta * margin - config.gamma)


@dataclass(frozen=True)
class CPOConfig:
    beta: float = 0.1
    """Scale of the summed margin, > 0."""
    lambda_: float = 1.0
    """Weight of the likelihood term on the chosen response, per token, >= 0."""

    def __post_init__(self) -> None:
        _require_positive(self, "beta")


@objective("cpo", CPOConfig, needs_reference=False)
def cpo(pair: PairLogProbs, config: CPOConfig) -> Tensor:
    """-log sigmoid(beta * m) - lambda * z_w/|y_w|, per pair (B,). Xu et al. 2024 (arXiv 2401.08417)."""
    return -F.logsigmoid(config.beta * (pair.z_w - pair.z_l)) - config.lambda_ * pair.z_w / pair.len_w


@dataclass(frozen=True)
class DILBCEConfig:
    """No parameters."""


@objective("dil_bce", DILBCEConfig, needs_reference=True)
def dil_bce(pair: PairLogProbs, config: DILBCEConfig) -> Tensor:
    """-log sigmoid(r_w) - log sigmoid(-r_l), per pair (B,): density-ratio estimation by binary cross-entropy.

    Direct imitation learning, Xiao et al. 2025 (DIL), as tabulated in arXiv 2604.18239.
    """
    return -F.logsigmoid(pair.z_w - pair.ref_w) - F.logsigmoid(-(pair.z_l - pair.ref_l))
