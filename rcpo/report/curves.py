"""What the figures show of a group, as small arrays: the interactive and the printed figures draw the same.

Steps are put into bins, so that a figure of a long run is as light as that of a short one; seeds are merged
into mean and standard error.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from rcpo.comparison.groups import Group
from rcpo.comparison.load import ComparedRun

NUM_BINS = 60
"""Points of a training curve at most."""
COSINE_EDGES = np.linspace(-1, 1, 41)
NUM_PARTS = 4
"""Training is cut into this many equal parts for the pathway shares."""
PATHWAYS = ("chosen up, rejected down", "both up", "both down", "chosen down, rejected up")
MAX_POINTS = 1000
"""Pairs shown in a scatter at most: every k-th."""


@dataclass(frozen=True)
class Curve:
    """Mean over seeds at each x, and its standard error (nan with one seed)."""

    x: np.ndarray
    mean: np.ndarray
    error: np.ndarray


@dataclass(frozen=True)
class BandCurve:
    """Means of position and centre and medians of the edges over the steps of a bin and all seeds; an edge is
    infinite where most are (rho <= 0)."""

    x: np.ndarray
    position: np.ndarray
    center: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    share_inside: float


@dataclass(frozen=True)
class PairPoints:
    """Change of chosen and rejected, pair by pair, means over seeds; `index` in the held-out set."""

    r_w: np.ndarray
    r_l: np.ndarray
    index: np.ndarray
    num_pairs: int


@contextmanager
def _of_nothing_is_nan() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _merge(x: np.ndarray, values: np.ndarray) -> Curve:
    """Over seeds, (S, points); points where nothing is finite are left out."""
    values = np.where(np.isfinite(values), values, np.nan)
    with _of_nothing_is_nan():
        mean = np.nanmean(values, 0)
        error = np.nanstd(values, 0, ddof=1) / np.sqrt((~np.isnan(values)).sum(0))
    kept = ~np.isnan(mean)
    return Curve(x[kept], mean[kept], error[kept])


def held_out_curve(group: Group, name: str) -> Curve:
    """displacement/`name` of the held-out pairs, at the steps that all seeds evaluated."""
    steps = set.intersection(*(set(run.evals["step"]) for run in group.runs))
    x = np.array(sorted(steps))
    values = [run.evals[f"displacement/{name}"][np.isin(run.evals["step"], x)] for run in group.runs]
    return _merge(x, np.stack(values))


def alpha_curve(group: Group) -> Curve:
    """calibration/alpha in bins of steps."""
    runs = [run for run in group.runs if "calibration/alpha" in run.curves]
    if not runs:
        return Curve(np.empty(0), np.empty(0), np.empty(0))
    edges = _bin_edges(np.concatenate([run.curves["step"] for run in runs]))
    values = np.full((len(runs), len(edges) - 1), np.nan)
    for row, run in zip(values, runs, strict=True):
        for idx, selected in enumerate(_bins(run.curves["step"], edges)):
            found = run.curves["calibration/alpha"][selected]
            row[idx] = found.mean() if len(found) else np.nan
    return _merge(_centers(edges), values)


def band_curve(group: Group) -> BandCurve | None:
    """None where no run measured its band."""
    runs = [run for run in group.runs if "band/position" in run.measured and len(run.measured["step"])]
    if not runs:
        return None
    steps, position, center, lower, upper, inside = (
        np.concatenate([run.measured[name] for run in runs])
        for name in ("step", *(f"band/{name}" for name in ("position", "center", "lower", "upper", "inside")))
    )
    edges = _bin_edges(steps)
    rows = []
    for x, selected in zip(_centers(edges), _bins(steps, edges), strict=True):
        if selected.any():
            means = [_finite_mean(values[selected]) for values in (position, center)]
            rows.append((x, *means, _median(lower[selected]), _median(upper[selected])))
    x, position, center, lower, upper = np.array(rows).T
    return BandCurve(x, position, center, lower, upper, float(inside.mean()))


def _bin_edges(steps: np.ndarray) -> np.ndarray:
    """At most `NUM_BINS` bins of equal width; each distinct step has one of its own where they are few."""
    distinct = np.unique(steps)
    num = min(NUM_BINS, len(distinct))
    spacing = (distinct[-1] - distinct[0]) / max(1, len(distinct) - 1) or 1.0
    return np.linspace(distinct[0] - spacing / 2, distinct[-1] + spacing / 2, num + 1)


def _centers(edges: np.ndarray) -> np.ndarray:
    return (edges[:-1] + edges[1:]) / 2


def _bins(steps: np.ndarray, edges: np.ndarray) -> Iterator[np.ndarray]:
    where = np.searchsorted(edges, steps, side="right") - 1
    return (where == idx for idx in range(len(edges) - 1))


def _finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _median(values: np.ndarray) -> float:
    """The middle value itself: the mean of two middle ones may be inf - inf."""
    known = np.sort(values[~np.isnan(values)])
    return float(known[len(known) // 2]) if len(known) else math.nan


def band_range(curves: list[BandCurve]) -> tuple[float, float]:
    """Limits that show every position and centre and the nearer three quarters of the finite edges."""
    middle = np.concatenate([values for curve in curves for values in (curve.position, curve.center)])
    middle = middle[np.isfinite(middle)]
    low, high = (float(middle.min()), float(middle.max())) if len(middle) else (-1.0, 1.0)
    lower = np.concatenate([curve.lower for curve in curves])
    upper = np.concatenate([curve.upper for curve in curves])
    if np.isfinite(lower).any():
        low = min(low, float(np.percentile(lower[np.isfinite(lower)], 25)))
    if np.isfinite(upper).any():
        high = max(high, float(np.percentile(upper[np.isfinite(upper)], 75)))
    pad = max(0.08 * (high - low), 0.05)
    return low - pad, high + pad


def cosine_shares(group: Group) -> np.ndarray | None:
    """Share of the measured steps of all seeds in each bin of `COSINE_EDGES`; None where none measured."""
    found = _measured(group, "score/cosine")
    if not len(found):
        return None
    return np.histogram(np.clip(found, -1, 1), COSINE_EDGES)[0] / len(found)


def _measured(group: Group, name: str) -> np.ndarray:
    values = [run.curves[name] for run in group.runs if name in run.curves]
    joined = np.concatenate(values) if values else np.empty(0)
    return joined[~np.isnan(joined)]


def pathway_shares(group: Group) -> np.ndarray | None:
    """(NUM_PARTS, 4): share of the measured steps of all seeds on each of `PATHWAYS`, by part of training;
    None where none measured."""
    counts = np.zeros((NUM_PARTS, len(PATHWAYS)))
    for run in group.runs:
        counts += _pathway_counts(run)
    if not counts.sum():
        return None
    with _of_nothing_is_nan():
        return counts / counts.sum(1, keepdims=True)


def _pathway_counts(run: ComparedRun) -> np.ndarray:
    counts = np.zeros((NUM_PARTS, len(PATHWAYS)))
    if "dynamics/pathway" not in run.curves:
        return counts
    steps, pathway = run.curves["step"], run.curves["dynamics/pathway"]
    part = np.minimum((NUM_PARTS * (steps - 1) / steps.max()).astype(int), NUM_PARTS - 1)
    known = ~np.isnan(pathway)
    np.add.at(counts, (part[known], pathway[known].astype(int)), 1)
    return counts


def pair_points(group: Group) -> PairPoints | None:
    """None without per-pair results, or where held-out answers are single ones."""
    pairs = [run.pairs for run in group.runs if run.pairs is not None]
    if not pairs:
        return None
    r_w, r_l = np.mean([each.r_w for each in pairs], 0), np.mean([each.r_l for each in pairs], 0)
    if np.isnan(pairs[0].start).any():
        return None
    index = np.arange(0, len(r_w), -(-len(r_w) // MAX_POINTS))
    return PairPoints(r_w[index], r_l[index], index, len(r_w))
