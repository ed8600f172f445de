"""The weight of a pair or a list, from its row: what multiplies its loss, and so its incentives.

Owns the columns that weights come from and which values are fit. `rcpo.objectives.composition` says which
kind a run uses; `rcpo.records.load` applies it to training rows. Held-out pairs are measured, not trained,
and need no such column.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rcpo.objectives.composition import OF_RESPONSES, Composition
from rcpo.records.record import BadRowError, PreferenceRecord

WEIGHT, PROBABILITY = "weight", "probability"
OF_SIDES = ("probability_chosen", "probability_rejected")
PROBABILITIES = "probabilities"
"""Of a row that is a list: of each of its responses, in the row's order."""
WEIGHT_PARTS = (WEIGHT, PROBABILITY, *OF_SIDES, PROBABILITIES)
"""Parts of a row that a weight may come from, beside prompt, chosen and rejected."""


@dataclass(frozen=True)
class ResponseWeights:
    """A weight of each response of a list, the best first, and how they combine."""

    each: tuple[float, ...]
    how: str
    """mean, product, or each: a mean of exponents, which is `of` times `spread`."""

    def of(self, places: Sequence[int]) -> float:
        """The weight of a pair, or a list, of the responses at these places."""
        chosen = [self.each[place] for place in places]
        return math.prod(chosen) if self.how == "product" else math.fsum(chosen) / len(chosen)

    def spread(self, places: Sequence[int]) -> tuple[float, ...] | None:
        """Each of these responses' weights over `of` them; None where one weight is all that counts."""
        mean = self.of(places)
        return tuple(self.each[place] / mean for place in places) if self.how == "each" else None


class Weighing(Protocol):
    """From a row to the weight of the pair or list that it is."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of a row that are read; each is a column of that name, or as data.columns says."""

    @property
    def list_parts(self) -> tuple[str, ...]:
        """Those of a row that is a list of responses."""

    @property
    def weigh_list(self) -> Callable[[Sequence[Any]], ResponseWeights] | None:
        """From the values of PROBABILITIES, the best response's first, to the responses' weights; raises
        BadRowError. None: a list has one weight, as a pair has."""

    @property
    def weigh_sides(self) -> Callable[[Mapping[str, Any]], ResponseWeights] | None:
        """The same of a pair, from its parts, the chosen response first."""

    def weight(self, values: Mapping[str, Any]) -> float:
        """The weight, finite and >= 0. Raises BadRowError."""


class Unweighted:
    """Every pair counts alike."""

    parts: tuple[str, ...] = ()
    list_parts: tuple[str, ...] = ()
    weigh_list: None = None
    weigh_sides: None = None

    def weight(self, values: Mapping[str, Any]) -> float:
        return 1.0


class ColumnWeight:
    """The number in the column `weight`: 2 counts a pair twice, 0 leaves it out of the loss."""

    parts: tuple[str, ...] = (WEIGHT,)
    list_parts: tuple[str, ...] = (WEIGHT,)
    weigh_list: None = None
    weigh_sides: None = None

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
    list_parts: tuple[str, ...] = (PROBABILITY,)
    weigh_list: None = None
    weigh_sides: None = None

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
    """DoRA's weights of all responses, from the columns `probability_chosen` and `probability_rejected` of a
    pair, or `probabilities` of a list, as one weight of the pair or list.

    mean: (1/n) sum_i w_i, as the published code does for DPO of pairs and of lists
    (github.com/stevie1023/DoRA, dpo_loss), which has it inside the exponent of KL-DRO. product: their
    product, the density ratio where responses are drawn independently and a = 0 or the weights are small; not
    published. each: one exponent for each response, (1/n) sum_i e^(w_i L / lambda) with L the loss of the
    pair or list, as that code does for RRHF (rrhf_loss); its L is the mean loss of a micro-batch, which its
    script makes of one list. A pair that is made of two responses of a list has the weights of these two. The
    published code has an a_i of each response's source; here it is the same for all, as there for n = 2 and
    4.
    """

    a: float
    a_i: float
    how: str
    parts: tuple[str, ...] = OF_SIDES
    list_parts: tuple[str, ...] = (PROBABILITIES,)

    def weight(self, values: Mapping[str, Any]) -> float:
        return self.weigh_sides(values).of((0, 1))

    def weigh_sides(self, values: Mapping[str, Any]) -> ResponseWeights:
        """As `Weighing` says."""
        return self._weights([(part, values[part]) for part in OF_SIDES])

    def weigh_list(self, probabilities: Sequence[Any]) -> ResponseWeights:
        """As `Weighing` says."""
        return self._weights([("one of the probabilities", value) for value in probabilities])

    def _weights(self, given: Sequence[tuple[str, Any]]) -> ResponseWeights:
        dora = DoraWeight(self.a, self.a_i)
        return ResponseWeights(tuple(dora.of(name, value) for name, value in given), self.how)


UNWEIGHTED = Unweighted()


def weighing_of(composition: Composition) -> Weighing:
    """The weighing that a composition names."""
    if composition.sample_weight == "weight":
        return ColumnWeight()
    if composition.sample_weight == "dora":
        return DoraWeight(composition.dora_a, composition.dora_a_i)
    if composition.sample_weight in OF_RESPONSES:
        how = str(composition.sample_weight).removeprefix("dora_")
        return DoraSidesWeight(composition.dora_a, composition.dora_a_i, how)
    return UNWEIGHTED


def weighed(record: PreferenceRecord, weighing: Weighing, values: Mapping[str, Any]) -> PreferenceRecord:
    """The record with the weight that its row has, and the weights of its two responses where they have their
    own. Raises BadRowError."""
    if weighing.weigh_sides is None:
        return dataclasses.replace(record, weight=weighing.weight(values))
    of = weighing.weigh_sides(values)
    return dataclasses.replace(record, weight=of.of((0, 1)), of_responses=of)


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
