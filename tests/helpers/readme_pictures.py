"""Draw the README's pictures of runs side by side; a script, not a test.

python tests/helpers/readme_pictures.py displacement .readme/displacement.png "dpo, off=RUN" ...
python tests/helpers/readme_pictures.py band .readme/band.png "calibration=exact=RUN" ...
python tests/helpers/readme_pictures.py population .readme/population.png "calibration=off=RUN"
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rcpo.common.console import nats, percent
from rcpo.monitor.plot import (
    ALPHA,
    BAND,
    CHOSEN,
    DPI,
    FAINT,
    REJECTED,
    SMOOTH_STEPS,
    STYLE,
    Rows,
    band_limits,
    column,
    draw_alpha,
    draw_band,
    draw_displacement,
    save,
    smooth,
)
from rcpo.runs.folder import RunFolder

EDGES = ("band/lower", "band/upper")


def plot_displacement(runs: list[tuple[str, RunFolder]], path: Path) -> None:
    """Several (label, run) on one scale, at most four in a row."""
    columns = len(runs) if len(runs) <= 4 else 3 if len(runs) <= 6 else 4
    lines = math.ceil(len(runs) / columns)
    with rc_context(STYLE):
        size = (max(6, 4.1 * columns), 3.4 * lines + 0.4)
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axis, (label, run) in zip(grid.flat, runs, strict=False):
            draw_displacement(axis, run.rows(run.metrics), run.rows(run.eval), with_raw=False)
            axis.set_title(label, fontweight="bold")
            axis.set_xlabel("optimizer step")
            axis.tick_params(labelbottom=True)
            if axis not in grid[:, 0]:
                axis.set_ylabel("")
        for axis in grid.flat[len(runs) :]:
            axis.remove()
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
        save(figure, path)


def plot_band(runs: list[tuple[str, RunFolder]], path: Path) -> None:
    """The band, alpha and both sides' displacement of several (label, run) that measured the band, on common
    scales; the band's edges as running medians."""
    heights = {"band": 2.5, "alpha": 1.1, "chosen": 1.8, "rejected": 1.8}
    rows = [(run.rows(run.metrics), run.rows(run.eval)) for _, run in runs]
    names = ("position", "center", "lower", "upper")
    limits = [band_limits(*(column(metrics, f"band/{name}")[1] for name in names)) for metrics, _ in rows]
    shared = min(low for low, _ in limits), max(high for _, high in limits)
    with rc_context(STYLE):
        size = (16 / 3 * len(runs), sum(heights.values()) + 1.3)
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        grid = figure.subplots(
            len(heights), len(runs), sharex=True, sharey="row", squeeze=False,
            height_ratios=list(heights.values()),
        )  # fmt: skip
        for column_axes, (label, _), (metrics, evals) in zip(grid.T, runs, rows, strict=True):
            axes = dict(zip(heights, column_axes, strict=True))
            draw_band(axes["band"], with_median_edges(metrics), shared)
            axes["band"].get_legend().remove()
            inside = percent(column(metrics, "band/inside")[1].mean())
            axes["band"].set_title(f"{label}\n", fontweight="bold", fontsize=12)
            _say(axes["band"], f"{inside} of the measured steps inside their band")
            draw_alpha(axes["alpha"], metrics)
            axes["alpha"].set_title("")
            _say(axes["alpha"], f"alpha of the last step {column(metrics, 'calibration/alpha')[1][-1]:.2f}")
            for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
                _draw_side(axes[side], side, colour, metrics, evals)
            column_axes[-1].set_xlabel("optimizer step")
        for axis in grid[:, 1:].flat:
            axis.set_ylabel("")
        entries: dict[str, Any] = {}
        for axis in grid[0]:
            handles, labels = axis.get_legend_handles_labels()
            entries = dict(zip(labels, handles, strict=True)) | entries
        figure.legend(entries.values(), entries.keys(), loc="outside upper right", ncols=len(entries))
        save(figure, path)


POPULATION_PANELS = {
    "cosine": ("score/cosine", "cosine of the two sides", (-0.3, 1.5)),
    "position": ("band/position", "position: log of pull over push", (-1.1, 1.1)),
    "slack": ("band/slack", "slack: inside the band above 0", (-0.6, 0.6)),
}
"""By the end of population/*: the batch's key, the panel's title, what is shown."""
POPULATION_KINDS = (
    ("population/", BAND, "population, 80 % interval"),
    ("population/adam_", ALPHA, "the same in Adam's metric"),
)


def plot_population(runs: list[tuple[str, RunFolder]], path: Path) -> None:
    """Cosine, position and slack of the population with their intervals, of one (label, run) that measured
    them with estimator weighted, over the batches' own."""
    ((label, run),) = runs
    metrics = run.rows(run.metrics)
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 3.9), dpi=DPI, layout="constrained")
        for axis, (key, (of_batch, title, limits)) in zip(
            figure.subplots(1, len(POPULATION_PANELS)), POPULATION_PANELS.items(), strict=True
        ):
            steps, values = column(metrics, of_batch)
            axis.axhline(1 if key == "cosine" else 0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
            axis.scatter(steps, values.clip(*limits), s=9, color=FAINT, label="batches, one by one")
            for kind, colour, name in POPULATION_KINDS:
                steps, low = column(metrics, f"{kind}{key}_lower")
                high = column(metrics, f"{kind}{key}_upper")[1]
                axis.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
                axis.plot(*column(metrics, f"{kind}{key}"), color=colour, linewidth=2, label=name)
            axis.set_ylim(*limits)
            axis.set_title(title)
            axis.set_xlabel("optimizer step")
        figure.suptitle(label, x=0.01, ha="left", fontweight="bold", fontsize=12)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=3)
        save(figure, path)


def with_median_edges(metrics: Rows) -> Rows:
    """The rows that measured the band, its edges as centred running medians over up to SMOOTH_STEPS values
    that may be infinite, shorter at the ends."""
    rows = [dict(row) for row in metrics if "band/position" in row]
    half = SMOOTH_STEPS // 2
    for name in EDGES:
        values = column(rows, name)[1]
        for idx, row in enumerate(rows):
            window = np.sort(values[max(0, idx - half) : idx + half + 1])
            known = window[~np.isnan(window)]
            # The middle value itself: the mean of two middle ones may be inf - inf.
            row[name] = known[len(known) // 2] if len(known) else math.nan
    return rows


def _draw_side(axis: Axes, side: str, colour: str, metrics: Rows, evals: Rows) -> None:
    """Displacement of one side: held-out pairs with markers, the batches as a running mean and one by one
    behind."""
    axis.axhline(0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    steps, values = column(metrics, f"displacement/{side}")
    axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.2, zorder=2)
    axis.plot(steps, smooth(values), color=colour, linewidth=1.1, alpha=0.45, zorder=3)
    steps, values = column(evals, f"displacement/{side}")
    marker = "o" if side == "chosen" else "s"
    axis.plot(steps, values, color=colour, linewidth=2.2, marker=marker, markersize=5, zorder=4)
    axis.set_ylabel(f"{side} (nats)")
    end = f" {nats(values[-1])} nats at the end" if len(values) and math.isfinite(values[-1]) else ""
    _say(axis, f"held-out {side} responses{end}")
    axis.margins(x=0.02)


def _say(axis: Axes, text: str) -> None:
    """A line over an axis."""
    axis.annotate(text, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=10)


def main(kind: str, picture: str, *labelled: str) -> None:
    """LABEL=RUN: the label may hold "=", the folder may not."""
    parts = [word.rpartition("=") for word in labelled]
    runs = [(label, RunFolder(run)) for label, _, run in parts]
    kinds = {"displacement": plot_displacement, "band": plot_band, "population": plot_population}
    kinds[kind](runs, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
