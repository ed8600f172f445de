"""Draw what a constant alpha does to both sides and to the accuracy, and print a Markdown table of the runs:
`python tests/helpers/alpha_curve.py PICTURE TITLE RUN...`.

The table is of all runs given, the picture of those with the first one's objective and calibration=fixed, or
off as alpha 1. A script, not a test.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from rcpo.config.schema import Config
from rcpo.monitor.plot import BAND, CHOSEN, DPI, FAINT, INK, REJECTED, STYLE, save
from rcpo.runs.frozen import open_run

Evals = list[dict[str, Any]]


def table_head(evals: Evals) -> str:
    """The columns of `table_row`, from one run's evaluations."""
    chosen = [f"chosen at {evals[1]['step']}", *(f"at {row['step']}" for row in evals[2:])]
    heads = [*chosen, "rejected", "margin", "accuracy", "chosen fell", "alpha: range, last"]
    return f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}"


def table_row(config: Config, evals: Evals, alphas: list[float]) -> str:
    """One run: the chosen side at every evaluation after the first, everything else at the last."""
    end, low, high = evals[-1], min(alphas), max(alphas)
    name = f"{config.objective['name']}, {config.calibration.name}"
    cells = [
        f"{name} {high:g}" if config.calibration.name == "fixed" else name,
        *(f"{row['displacement/chosen']:+.2f}" for row in evals[1:]),
        f"{end['displacement/rejected']:+.2f}",
        f"{end['displacement/margin']:.2f}",
        f"{end['displacement/accuracy']:.2f}",
        f"{100 * end['displacement/chosen_down']:.0f} %",
        f"{high:g}" if low == high else f"{low:.2f} to {high:.2f}, {alphas[-1]:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def crossing(alphas: list[float], values: list[float]) -> float:
    """alpha at which `values`, rising with `alphas`, passes 0, linear between the points; nan where it does
    not."""
    return float(np.interp(0.0, values, alphas, left=np.nan, right=np.nan))


def draw(points: dict[float, dict[str, float]], title: str, path: Path) -> None:
    """Both sides over the accuracy; shaded where the chosen side rises while the rejected one falls."""
    alphas = sorted(points)
    sides = {side: [points[a][f"displacement/{side}"] for a in alphas] for side in ("chosen", "rejected")}
    low, high = crossing(alphas, sides["chosen"]), crossing(alphas, sides["rejected"])
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.7), dpi=DPI, layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        if low < high:
            top.axvspan(low, high, color=BAND, alpha=0.15, lw=0)
            text = f"chosen up, rejected down:\nalpha {low:.3f} to {high:.3f}"
            at = (high, min(sides["rejected"]))
            top.annotate(text, at, (8, 2), textcoords="offset points", color=BAND)
        top.axhline(0, color=FAINT, lw=1, ls="--")
        for side, colour, marker in (("chosen", CHOSEN, "o"), ("rejected", REJECTED, "s")):
            top.plot(alphas, sides[side], color=colour, marker=marker, lw=2)
            at = (alphas[-1], sides[side][-1])
            top.annotate(side, at, (8, -4), textcoords="offset points", color=colour, fontweight="bold")
        top.set_ylabel("held-out change (nats)")
        top.set_title(title, fontsize=11)
        accuracies = [points[a]["displacement/accuracy"] for a in alphas]
        bottom.plot(alphas, accuracies, color=INK, marker="D", lw=1.6)
        bottom.set(ylabel="accuracy", xlabel="alpha", ylim=(0.5, 0.75))
        top.set_xlim(alphas[0] - 0.01, alphas[-1] + 0.035)
        save(figure, path)


def main(picture: str, title: str, *paths: str) -> None:
    points: dict[float, dict[str, float]] = {}
    drawn = open_run(paths[0])[1].objective["name"]
    for idx, path in enumerate(paths):
        run, config = open_run(path)
        evals = run.rows(run.eval)
        alphas = [row["calibration/alpha"] for row in run.rows(run.metrics)]
        if idx == 0:
            print(table_head(evals))
        print(table_row(config, evals, alphas))
        if config.calibration.name in ("off", "fixed") and config.objective["name"] == drawn:
            if alphas[-1] in points:
                sys.exit(f"{path}: alpha {alphas[-1]:g} a second time; the picture is of one run for each")
            points[alphas[-1]] = evals[-1]
    if not points:
        sys.exit(f"no run of {drawn} with calibration=off or fixed: nothing to draw")
    draw(points, title, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
