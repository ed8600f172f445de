"""Draw alpha, and what it is steered by, over the steps of calibrated runs: `python
tests/helpers/balance_curves.py PICTURE RUN...`.

A column a run: alpha and the alpha that would hold c; c as measured on the probe, and both sides of the
held-out pairs, dotted those of the run with the same objective and calibration=off. A script, not a test.
"""

import sys
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rcpo.config.schema import Config
from rcpo.monitor.plot import BAND, CHOSEN, DPI, FAINT, INK, REJECTED, STYLE, save
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run

SIDES = {"chosen": CHOSEN, "rejected": REJECTED}


def curve(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the key."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def draw_alpha(axes: Axes, rows: list[dict[str, Any]], title: str) -> None:
    axes.axhline(1, color=FAINT, lw=1, ls="--")
    axes.plot(*curve(rows, "calibration/alpha"), color=BAND, lw=1.8, label="alpha")
    axes.plot(*curve(rows, "calibration/holding_alpha"), color=INK, lw=0.8, label="alpha that would hold c")
    axes.set_title(title, fontsize=11)


def draw_sides(axes: Axes, run: RunFolder, off: RunFolder | None) -> None:
    axes.axhline(0, color=FAINT, lw=1, ls="--")
    measured = curve(run.rows(run.metrics), "calibration/measured")
    axes.step(*measured, color=INK, lw=0.8, label="c, on the probe")
    for side, colour in SIDES.items():
        key = f"displacement/{side}"
        axes.plot(*curve(run.rows(run.eval), key), color=colour, marker="o", lw=2, label=side)
        if off is not None:
            axes.plot(*curve(off.rows(off.eval), key), color=colour, ls=":", lw=1.4, label=f"{side}, off")
    axes.set_xlabel("optimizer step")


def main(picture: str, *paths: str) -> None:
    runs: list[tuple[RunFolder, Config]] = [open_run(path) for path in paths]
    plain = {str(config.objective): run for run, config in runs if config.calibration.name == "off"}
    shown = [(run, config) for run, config in runs if config.calibration.name != "off"]
    with rc_context(STYLE):
        figure = Figure(figsize=(4 * len(shown), 5.4), dpi=DPI, layout="constrained")
        columns = figure.subplots(2, len(shown), sharex=True, squeeze=False)
        for (top, bottom), (run, config) in zip(columns.T, shown, strict=True):
            draw_alpha(top, run.rows(run.metrics), f"{config.objective['name']}, {config.calibration.name}")
            draw_sides(bottom, run, plain.get(str(config.objective)))
        columns[0, 0].set_ylabel("alpha")
        columns[1, 0].set_ylabel("held-out change (nats)")
        for axes in columns[:, 0]:
            axes.legend(fontsize=7, frameon=False)
        save(figure, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
