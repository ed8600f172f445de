"""What every objective accepts beside its own parameters: sums or means of log-probs, weights of pairs, what
takes the mean's place, and the module that registers an objective of a user's own.

Owns these keys of the `objective` section, their rules, and the one way from that section to an `Objective`.
Their defaults stand in conf/every_objective.yaml. Does not own what they mean:
`rcpo.objectives.loss` averages log-probs, `rcpo.records.weights` reads the weights, `rcpo.training.step`
multiplies by them, `rcpo.training.aggregate` aggregates."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rcpo.common.conf import IN_CONF, conf_dir, defaults_in, option_tree
from rcpo.common.errors import UserError
from rcpo.objectives.loss import Objective
from rcpo.objectives.own import import_own
from rcpo.objectives.parameters import ParameterError, check_kind, require_not_negative, require_positive
from rcpo.objectives.registry import TOP, load_at, one_line

SAMPLE_WEIGHTS = (None, "weight", "dora")
AGGREGATES = ("mean", "kl_dro")
LOG_PROBS = ("sum", "mean")
SHARED = "every_objective"
"""The file of conf/ with the defaults."""


def composition_defaults() -> Mapping[str, Any]:
    """The keys of the `objective` section that every objective has, and their defaults."""
    return option_tree(conf_dir() / f"{SHARED}.yaml")


@dataclass(frozen=True)
@defaults_in(SHARED)
class Composition:
    """How the losses of single pairs become the loss of a global batch.

    `sample_weight` is a key of its own, and a column alone weighs nothing: a file that happens to have a
    column named weight trains as it did before, and a sweep compares weighted with unweighted runs of the
    same data.
    """

    log_probs: str = IN_CONF
    """sum: z and ref as the objective's formula has them, summed over tokens. mean: both divided by the
    response's length before the loss sees them, which then finds |y| = 1: what divides by |y| divides once,
    and a loss about lengths (r_dpo) keeps them."""
    sample_weight: str | None = IN_CONF
    """null: every pair counts alike. weight: by the column `weight`. dora: by 1/(a + a_i (1-p)/p) of the
    column `probability` (`rcpo.records.weights`)."""
    dora_a: float = IN_CONF
    """DoRA's a > 0: the target distribution's share of the data; the weight is at most 1/a. Published code:
    1/2 for pairs."""
    dora_a_i: float = IN_CONF
    """DoRA's a_i >= 0: the share of the distribution that the pair comes from. Published code: 1/2 for
    pairs."""
    aggregate: str = IN_CONF
    """mean, or kl_dro: lambda log mean exp(loss/lambda) over the global batch (`rcpo.training.aggregate`)."""
    dro_lambda: float = IN_CONF
    """lambda of kl_dro, > 0, in units of the loss: towards infinity the mean, towards 0 the worst pair.
    Published code: 1."""
    module: str | None = IN_CONF
    """File or Python module of a user's own that registers objectives (`rcpo.objectives.own`); null: none."""

    def __post_init__(self) -> None:
        if self.log_probs not in LOG_PROBS:
            raise ParameterError("log_probs", self.log_probs, "sum or mean", "sum")
        if self.sample_weight not in SAMPLE_WEIGHTS:
            raise ParameterError("sample_weight", self.sample_weight, "null, weight or dora", "weight")
        if self.aggregate not in AGGREGATES:
            raise ParameterError("aggregate", self.aggregate, "mean or kl_dro", "mean")
        require_positive(self, "dora_a", "dro_lambda")
        require_not_negative(self, "dora_a_i")
        defaults = composition_defaults()
        for key, switch, option in (
            ("dora_a", "sample_weight", "dora"),
            ("dora_a_i", "sample_weight", "dora"),
            ("dro_lambda", "aggregate", "kl_dro"),
        ):
            if getattr(self, key) != defaults[key] and getattr(self, switch) != option:
                raise UserError(
                    f"{TOP}.{key}={getattr(self, key)}: has no effect without {option}; type "
                    f"{TOP}.{switch}={option}, or {TOP}.{key}={defaults[key]}"
                )

    def describe(self) -> str:
        """What departs from summed log-probs and the mean loss, for people; empty where nothing does."""
        parts = []
        if self.log_probs == "mean":
            parts.append("log-probabilities averaged over each response's tokens")
        if self.sample_weight == "weight":
            parts.append("each pair's loss times its weight in the data")
        if self.sample_weight == "dora":
            parts.append(f"each pair's loss times DoRA's weight 1/({self.dora_a} + {self.dora_a_i} (1-p)/p)")
        if self.aggregate == "kl_dro":
            parts.append(f"{self.dro_lambda} log mean exp(loss/{self.dro_lambda}) in place of the mean")
        return "; ".join(parts)


def composition_of(section: Mapping[str, Any]) -> Composition:
    """The composition in an `objective` section. Raises UserError with one line."""
    defaults = composition_defaults()
    params = {key: value for key, value in section.items() if key in defaults}
    try:
        for key, value in params.items():
            if isinstance(defaults[key], float):
                check_kind(key, value, defaults[key])
        return Composition(**params)
    except ParameterError as error:
        raise UserError(one_line(TOP, error, defaults)) from None


def objective_of(section: Mapping[str, Any], fresh: bool = False) -> Objective:
    """The objective of an `objective` section {name, its parameters, keys of the composition}; `fresh`:
    import its module again where the file has changed. Raises UserError with one line, as `load_objective`
    does."""
    if section.get("module") is not None:
        import_own(section["module"], fresh)
    shared = composition_defaults()
    params = {str(key): value for key, value in section.items() if key not in shared}
    loaded = load_at(TOP, str(params.pop("name", None)), params, also=tuple(shared))
    return dataclasses.replace(loaded, averages=composition_of(section).log_probs == "mean")
