"""From the two sides' vectors of a measured step to numbers: the batch's geometry, and with
metrics.population the population's.

Owns the running sums of vectors, this rank's shards, and what a checkpoint keeps of them;
`rcpo.method.population` says what they are good for. Called by `rcpo.training.measurement`.
"""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rcpo.method.population import PairSums, PopulationGeometry
from rcpo.method.scores import ScoreGeometry, Sides, partial_dot

logger = logging.getLogger(__name__)

PLAIN, ADAM = "population", "adam"
"""The metrics in which vectors are compared."""


@dataclass(frozen=True)
class Measured:
    """Score geometry of one optimizer step's global batch."""

    geometry: ScoreGeometry | None = None
    """None where the step was not measured."""
    population: dict[str, PopulationGeometry] = field(default_factory=dict)
    """"population" and, in Adam's metric, "adam": from all pairs of measurements, this one included."""


class Reader:
    """Reads one measurement after the other; a measurement joins the sums once its step has been taken
    (`keep`)."""

    def __init__(self, weighted: bool, population: bool) -> None:
        self.weighted, self.population = weighted, population
        self._sums: Sides | None = None
        self._pairs = {PLAIN: PairSums(), ADAM: PairSums()}
        self._coming: Sides | None = None
        self._coming_pairs: dict[str, PairSums] = {}
        self._kinds: list[str] = []

    def products(self, sides: Sides, metric: list[Tensor] | None) -> Tensor:
        """This rank's share of three products per kind of geometry; `metric` is 1/sqrt(second moment) of
        Adam, by parts."""
        products = [sides.partial_products()]
        self._kinds = []
        if self.population:
            self._coming = sides
            if self._sums is not None:
                products.append(_cross_products(sides, self._sums, []))
                self._kinds.append(PLAIN)
                if metric is not None:
                    products.append(_cross_products(sides, self._sums, metric))
                    self._kinds.append(ADAM)
        return torch.cat(products)

    def read(self, products: list[float]) -> Measured:
        """The geometries from the sums over ranks."""
        batch = ScoreGeometry(products[0], products[1], products[2], self.weighted)
        if not self.population:
            return Measured(batch)
        found = {kind: products[3 * idx : 3 * idx + 3] for idx, kind in enumerate(self._kinds, start=1)}
        self._coming_pairs = {kind: pairs.after(found.get(kind)) for kind, pairs in self._pairs.items()}
        return Measured(
            batch,
            {
                kind: geometry
                for kind in found
                if (geometry := self._coming_pairs[kind].geometry(self.weighted)) is not None
            },
        )

    def keep(self) -> None:
        """Let the measurement that was read last join the sums."""
        if self._coming is None:
            return
        if self._sums is None:
            chosen, rejected = ([torch.zeros_like(part) for part in side] for side in self._coming[:2])
            self._sums = Sides(chosen, rejected, 1.0, 1.0)
        for sums, side, scale in zip(self._sums[:2], self._coming[:2], self._coming[2:], strict=True):
            for total, part in zip(sums, side, strict=True):
                total.add_(part, alpha=scale)
        self._pairs, self._coming = self._coming_pairs, None

    def state(self) -> dict[str, Tensor]:
        """The sums, this rank's shards of the vectors and the numbers that all ranks have."""
        if self._sums is None:
            return {}
        named = {
            f"{name}.{idx}": part
            for name, parts in zip(("chosen", "rejected"), self._sums[:2], strict=True)
            for idx, part in enumerate(parts)
        }
        numbers = {
            f"pairs.{kind}": torch.tensor(pairs.state(), dtype=torch.float64)
            for kind, pairs in self._pairs.items()
        }
        return named | numbers

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Take `state` back."""
        if not state:
            return
        pairs = {name.removeprefix("pairs."): state[name] for name in state if name.startswith("pairs.")}
        if not pairs:
            logger.warning("population/* starts anew: the checkpoint is of an rcpo that kept no sums")
            return
        self._pairs = {kind: PairSums.from_state(numbers.tolist()) for kind, numbers in pairs.items()}
        num_parts = (len(state) - len(pairs)) // 2
        chosen, rejected = (
            [state[f"{name}.{idx}"].to(device) for idx in range(num_parts)] for name in ("chosen", "rejected")
        )
        self._sums = Sides(chosen, rejected, 1.0, 1.0)


def _cross_products(now: Sides, sums: Sides, metric: list[Tensor]) -> Tensor:
    chosen = now.chosen_scale * partial_dot(now.chosen, sums.chosen, metric)
    rejected = now.rejected_scale * partial_dot(now.rejected, sums.rejected, metric)
    mixed = now.chosen_scale * partial_dot(now.chosen, sums.rejected, metric)
    mixed += now.rejected_scale * partial_dot(now.rejected, sums.chosen, metric)
    return torch.stack([chosen, rejected, mixed / 2])
