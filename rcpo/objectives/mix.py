"""Weighted sums of other objectives: objective=mix objective.terms=[{name: dpo, weight: 1}, {name: sft,
weight: 0.2}].

Owns how terms are written and checked; a term's own parameters stand inline in it, {name: dpo, weight: 1,
beta: 0.2}. Called through `rcpo.objectives.load_objective`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcpo.common.errors import UserError
from rcpo.objectives.loss import BatchStatistic, Objective, PairLogProbs
from rcpo.objectives.registry import load_at, objective

EXAMPLE = "objective.terms='[{name: dpo, weight: 1}, {name: sft, weight: 0.2}]'"


class Term(NamedTuple):
    weight: float
    objective: Objective


@dataclass(frozen=True)
class MixConfig:
    terms: list[dict[str, Any]]
    """Each with the name of another objective, a weight (finite; 1 if left out) and that objective's
    parameters."""

    def __post_init__(self) -> None:
        if not self.loaded:
            raise UserError(f"objective.terms=[]: must hold at least one term; type {EXAMPLE}")

    @cached_property
    def loaded(self) -> list[Term]:
        """The terms with their objectives built."""
        return [_load_term(f"objective.terms[{idx}]", term) for idx, term in enumerate(self.terms)]


def _load_term(path: str, term: Any) -> Term:
    if not isinstance(term, Mapping) or "name" not in term:
        raise UserError(f"{path}={term}: must be a mapping with a name; type for example {EXAMPLE}")
    params = {str(key): value for key, value in term.items()}
    name, weight = str(params.pop("name")), params.pop("weight", 1.0)
    if name == "mix":
        raise UserError(
            f"{path}.name=mix: a term cannot be a mix; write the inner terms into objective.terms"
        )
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"{path}.weight={weight}: must be a finite number; write weight: 1.0 in that term")
    term = Term(float(weight), load_at(path, name, params))
    if term.objective.weighs_tokens:
        raise UserError(
            f"{path}.name={name}: weighs the tokens of z, which the other terms would read too; write "
            "another objective there"
        )
    if term.objective.match is not None:
        raise UserError(
            f"{path}.name={name}: compares ranks within the global batch, which a term does not see; write "
            "another objective there"
        )
    return term


def _needs_reference(config: MixConfig) -> bool:
    return any(term.objective.needs_reference for term in config.loaded)


def _statistics(config: MixConfig) -> tuple[BatchStatistic, ...]:
    return tuple(statistic for term in config.loaded for statistic in term.objective.statistics)


def _listwise(config: MixConfig) -> bool:
    return all(term.objective.listwise for term in config.loaded)


@objective("mix", MixConfig, needs_reference=_needs_reference, statistics=_statistics, listwise=_listwise)
def mix(pair: PairLogProbs, config: MixConfig) -> Tensor:
    """sum_k weight_k * L_k, per pair (B,); each L_k reads its own part of the state."""
    total, start = torch.zeros_like(pair.z_w), 0
    for weight, term in config.loaded:
        stop = start + sum(statistic.width for statistic in term.statistics)
        total = total + weight * term(pair._replace(state=pair.state[start:stop]))
        start = stop
    return total
