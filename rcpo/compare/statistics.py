"""Is a difference larger than chance? Paired over held-out pairs, with seeds and pairs both random.

Two cells are trained with the same seeds and measured on the same pairs, so every difference delta[s, i]
(seed s, pair i) is one of two runs that share seed and pair. Another draw of held-out pairs and another draw
of seeds would both have given another mean: its squared standard error is the sum of the two,

    SE^2 = var_i(mean_s delta) / n  +  var_s(mean_i delta) / S

and mean / SE is compared with Student's t at Satterthwaite's degrees of freedom. This is min F' of Clark
1973 (The language-as-fixed-effect fallacy), for crossed random effects, and errs on the careful side: both
terms hold the noise of single runs on single pairs. Pooling all S n differences as independent would claim
far too much. With one seed the second term is unknown, and the result speaks of that one pair of runs only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)


@dataclass(frozen=True)
class Difference:
    """Mean paired difference with its 95 % confidence interval and two-sided p."""

    mean: float
    low: float
    high: float
    p: float
    se_pairs: float
    se_seeds: float
    """nan with one seed."""
    num_seeds: int
    num_pairs: int


def paired_difference(delta: np.ndarray) -> Difference:
    """The difference that `delta` (S seeds, n pairs) is a sample of; nan limits and p where n is 1."""
    num_seeds, num_pairs = delta.shape
    mean = float(delta.mean())
    se_pairs, se_seeds = _standard_error(delta.mean(0)), _standard_error(delta.mean(1))
    parts = [(se_pairs**2, num_pairs - 1)]
    if num_seeds > 1:
        parts.append((se_seeds**2, num_seeds - 1))
    variance = sum(part for part, _ in parts)
    if math.isnan(variance):
        low = high = p = math.nan
    elif variance == 0:
        low = high = mean
        p = 1.0 if mean == 0 else 0.0
    else:
        freedom = variance**2 / sum(part**2 / each for part, each in parts)
        reach = student_quantile(0.975, freedom) * math.sqrt(variance)
        low, high = mean - reach, mean + reach
        p = student_p(mean / math.sqrt(variance), freedom)
    return Difference(mean, low, high, p, se_pairs, se_seeds, num_seeds, num_pairs)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error); the error is nan for one value."""
    return float(np.mean(values)), _standard_error(np.asarray(values, float))


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def student_p(t: float, freedom: float) -> float:
    """P(|T| > |t|) of Student's t with `freedom` >= 1 degrees of freedom.

    With T = sqrt(freedom) tan(angle) the density is proportional to cos(angle)^(freedom - 1) on (-pi/2,
    pi/2): smooth and bounded, so Gauss-Legendre on the tail is exact to about 1e-9.
    """
    whole = _tail(0.0, freedom)
    return min(1.0, _tail(math.atan(abs(t) / math.sqrt(freedom)), freedom) / whole)


def _tail(start: float, freedom: float) -> float:
    end = min(math.pi / 2, start + 40 / math.sqrt(freedom))
    angles = start + (end - start) * (NODES + 1) / 2
    return float((WEIGHTS * np.cos(angles) ** (freedom - 1)).sum() * (end - start) / 2)


def student_quantile(probability: float, freedom: float) -> float:
    """t with P(T <= t) = `probability` > 0.5, by bisection."""
    low, high = 0.0, 1.0
    while student_p(high, freedom) > 2 * (1 - probability):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > 2 * (1 - probability) else (low, middle)
    return (low + high) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """p adjusted for looking at all of them (Holm 1979); nan stays nan and counts for nothing."""
    adjusted = [math.nan] * len(p_values)
    known = sorted((p, idx) for idx, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for rank, (p, idx) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[idx] = largest
    return adjusted
