"""The geometry of the population's two sides, from all pairs of measurements so far, and how well it is
known.

One batch's |v|^2 is mostly its own noise. Products between *different* batches have none of it on average.
With v(1) .. v(n) the vectors of the measured steps and S(t) = v(1) + .. + v(t),

    U(n) = sum over t != t' of <v(t), v(t')> / (n (n-1)) = (|S(n)|^2 - sum of |v(t)|^2) / (n (n-1))
         = sum over t of <v(t), S(t-1)> / (n (n-1) / 2)

estimates |mean v|^2 of a side, and with both sides the mixed product. The last form is what is kept: one
vector a side, S, and a few numbers. It takes no difference of large squares, and it says what a changing
metric means.

Adam's metric is 1/sqrt(second moment), another one at every step. Each pair of measurements counts in the
metric of the *later* one: <v(t), S(t-1)> in the metric of step t is, to first order, what Adam's step along
v(t) does to the z of all batches before it. The moments are without their bias towards 0, or the first pairs
would weigh up to 30 times the later ones, and of at least five gradients (`rcpo.engine.engine`). A factor
common to the three products drops out of cosine and centre. Vectors and metric change while the model learns,
so both kinds are averages over the training so far, as a mean over its steps is.

The spread, for independent measurements. <v, v'> of two measurements is the population's value + a(v) + a(v')
+ g(v, v'), all of them uncorrelated; let s2 = var a and tau = var g. Then var U(n) = 4 s2 / n + 2 tau / (n
(n-1)), and each new measurement brings a surprise

    y(t) = <v(t), S(t-1)> / (t-1) - U(t-1),    E y(t)^2 = t/(t-1) (s2 + tau / (t-2)),    E y(t) y(t') = 0

The mean of (t-1)/t y(t)^2 with weights t-2, times 4/n, is 4 s2 / n + 8 tau / (n (n-1)): right for the part
that stays, up to twice too wide (in its root) while noise dominates. A jackknife would be 1.4 times too wide
there, and would want all vectors. What training changes in v adds to y and widens the interval too. y has
three entries, so this is a 3 x 3 matrix, and `rcpo.method.metrics` takes the variance of cosine, centre and
slack from it to first order.

Owns the numbers; `rcpo.training.reader` owns the vectors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rcpo.method.scores import ScoreGeometry

Numbers = NDArray[np.float64]

LEVEL = 0.8
"""Coverage of the intervals."""
EDGE = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Standard errors from the estimate to an edge: 1.28."""
MIN_SURPRISES = 4
"""From which an interval is given: six measurements."""


@dataclass(frozen=True)
class PopulationGeometry(ScoreGeometry):
    """Squared lengths and dot product of the population's mean vectors, each of them an estimate that noise
    may push below 0."""

    num_measurements: int = 0
    covariance: tuple[float, ...] | None = None
    """Of the estimates (chosen_squared, rejected_squared, dot): 3 x 3, row after row; None from too few
    measurements."""

    @property
    def is_positive(self) -> bool:
        """Whether both squared lengths are, so that a cosine exists."""
        return self.chosen_squared > 0 and self.rejected_squared > 0

    @property
    def cosine(self) -> float:
        """An estimate, which may lie beyond 1: cut off there it would be too low on average. nan where a
        squared length is not positive."""
        if not self.is_positive:
            return math.nan
        return self.dot / math.sqrt(self.chosen_squared * self.rejected_squared)

    def cosine_gradient(self) -> Numbers:
        """Of the cosine, by the three products."""
        half = -self.cosine / 2
        by_dot = 1 / math.sqrt(self.chosen_squared * self.rejected_squared)
        return np.array([half / self.chosen_squared, half / self.rejected_squared, by_dot])

    def log_norms_gradient(self) -> Numbers:
        """Of log(|v_l| / |v_w|), by the three products."""
        return np.array([-0.5 / self.chosen_squared, 0.5 / self.rejected_squared, 0.0])

    def reach(self, gradient: Numbers) -> float:
        """From an estimate with this gradient to an edge of its interval; nan without a covariance."""
        if self.covariance is None:
            return math.nan
        variance = float(gradient @ np.reshape(self.covariance, (3, 3)) @ gradient)
        return EDGE * math.sqrt(max(0.0, variance))


@dataclass(frozen=True)
class PairSums:
    """What is kept of the products between measurements, in one metric."""

    num_measurements: int = 0
    num_pairs: int = 0
    """Pairs of measurements whose products are known: all, but for those without a metric."""
    num_surprises: int = 0
    weight: float = 0.0
    """Sum over the surprises of t-2."""
    products: tuple[float, ...] = (0.0,) * 3
    """Sum over t of <v(t), S(t-1)>: of the chosen side, the rejected side, the mean of both mixed ones."""
    surprises: tuple[float, ...] = (0.0,) * 9
    """Sum over t of (t-2) (t-1)/t y y^T, 3 x 3, row after row."""

    def after(self, products: Sequence[float] | None) -> "PairSums":
        """With one measurement more, whose products with the sum of those before are given; None where there
        are none before, or no metric."""
        t = self.num_measurements + 1
        if products is None:
            return replace(self, num_measurements=t)
        known = replace(
            self,
            num_measurements=t,
            num_pairs=self.num_pairs + t - 1,
            products=tuple(np.add(self.products, products).tolist()),
        )
        if self.num_pairs == 0:
            return known
        y = np.array(products) / (t - 1) - self._means()
        outer = (t - 2) * (t - 1) / t * np.outer(y, y).flatten()
        return replace(
            known,
            num_surprises=self.num_surprises + 1,
            weight=self.weight + t - 2,
            surprises=tuple((outer + self.surprises).tolist()),
        )

    def _means(self) -> Numbers:
        return np.array(self.products) / self.num_pairs

    def geometry(self, weighted: bool) -> PopulationGeometry | None:
        """The estimates; None before the first products."""
        if self.num_pairs == 0:
            return None
        n, covariance = self.num_measurements, None
        if self.num_surprises >= MIN_SURPRISES:
            covariance = tuple((4 / n * np.array(self.surprises) / self.weight).tolist())
        chosen, rejected, dot = self._means().tolist()
        return PopulationGeometry(chosen, rejected, dot, weighted, n, covariance)

    def state(self) -> list[float]:
        """16 numbers, for a checkpoint."""
        counts = (self.num_measurements, self.num_pairs, self.num_surprises)
        return [*map(float, counts), self.weight, *self.products, *self.surprises]

    @classmethod
    def from_state(cls, state: Sequence[float]) -> "PairSums":
        """Take `state` back."""
        num_measurements, num_pairs, num_surprises = (int(count) for count in state[:3])
        return cls(num_measurements, num_pairs, num_surprises, state[3], tuple(state[4:7]), tuple(state[7:]))
