"""The weight of a pair, from its row: what multiplies the pair's loss, and so its incentives.

Owns the columns that weights come from and which values are fit. `rcpo.objectives.composition` says which
kind a run uses; `rcpo.records.load` applies it to training rows. Held-out pairs are measured, not trained,
and need no such column.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rcpo.objectives.composition import Composition
from rcpo.records.record import BadRowError

WEIGHT, PROBABILITY = "weight", "probability"
OF_SIDES = ("probability_chosen", "probability_rejected")
WEIGHT_PARTS = (WEIGHT, PROBABILITY, *OF_SIDES)
"""Parts of a row that a weight may come from, beside prompt, chosen and rejected."""


class Weighing(Protocol):
    """From a row to the pair's weight."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of a row that are read; each is a column of that name, or as data.columns says."""

    def weight(self, values: Mapping[str, Any]) -> float:
        """The weight, finite and >= 0. Raises BadRowError."""


class Unweighted:
    """Every pair counts alike."""

    parts: tuple[str, ...] = ()

    def weight(self, values: Mapping[str, Any]) -> float:
        return 1.0


class ColumnWeight:
    """The number in the column `weight`: 2 counts a pair twice, 0 leaves it out of the loss."""

    parts: tuple[str, ...] = (WEIGHT,)

    def weight(self, values: Mapping[str, Any]) -> float:
        weight = _number(WEIGHT, values[WEIGHT])
        if weight < 0:
            raise BadRowError("weight is negative")
        return weight


@dataclass(frozen=True)
class DoraWeight:
    """1/(a + a_i (1-p)/p), p = the column `probability`: how likely a classifier thinks that the pair is of
    the target distribution. Increases with p, from 0 to 1/a.

    DoRA, "distribution-aware optimization for robust alignment", Zhu et al. 2025, arXiv 2504.05831. Checked
    against its published code: the formula, a = a_i = 1/2 for two responses, and that the weight multiplies
    the loss inside the exponential of KL-DRO. Departures: that code has a probability for each response and
    averages their weights (`DoraSidesWeight`), this has one for each pair, and the
    weight stands alone too, with the mean. From the design alone: what a and a_i are called. The formula
    needs p > 0; p = 1, which a saturated classifier gives, is fit.
    """

    a: float
    a_i: float
    parts: tuple[str, ...] = (PROBABILITY,)

    def weight(self, values: Mapping[str, Any]) -> float:
        return self.of(PROBABILITY, values[PROBABILITY])

    def of(self, part: str, value: Any) -> float:
        """The weight that the value of this part stands for. Raises BadRowError."""
        p = _number(part, value)
        if not 0 < p <= 1:
            raise BadRowError(f"{part} is not above 0 and at most 1")
        return p / (self.a * p + self.a_i * (1 - p))


@dataclass(frozen=True)
class DoraSidesWeight:
    """DoRA's weights of both responses, from the columns `probability_chosen` and `probability_rejected`, as
    one weight of the pair.

    mean: (w_chosen + w_rejected) / 2, as the published code does for DPO (github.com/stevie1023/DoRA,
    dpo_loss), which has it inside the exponent of KL-DRO. product: w_chosen w_rejected, the pair's density
    ratio where both responses are drawn independently and a = 0 or the weights are small; not published.
    """

    a: float
    a_i: float
    how: str
    parts: tuple[str, ...] = OF_SIDES

    def weight(self, values: Mapping[str, Any]) -> float:
        chosen, rejected = (DoraWeight(self.a, self.a_i).of(part, values[part]) for part in OF_SIDES)
        return chosen * rejected if self.how == "product" else (chosen + rejected) / 2


UNWEIGHTED = Unweighted()


def weighing_of(composition: Composition) -> Weighing:
    """The weighing that a composition names."""
    if composition.sample_weight == "weight":
        return ColumnWeight()
    if composition.sample_weight == "dora":
        return DoraWeight(composition.dora_a, composition.dora_a_i)
    if composition.sample_weight in ("dora_mean", "dora_product"):
        how = str(composition.sample_weight).removeprefix("dora_")
        return DoraSidesWeight(composition.dora_a, composition.dora_a_i, how)
    return UNWEIGHTED


def _number(part: str, value: Any) -> float:
    """A finite number; text that is one (CSV has no other) counts."""
    if value is None or value == "":
        raise BadRowError(f"{part} is null")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRowError(f"{part} is not a finite number")
    return number


def describe_weights(weights: list[float]) -> str:
    """One line for the log."""
    mean, zeros = math.fsum(weights) / len(weights), weights.count(0.0)
    return f"weights: mean {mean:.4g}, from {min(weights):.4g} to {max(weights):.4g}, {zeros} of them 0"
