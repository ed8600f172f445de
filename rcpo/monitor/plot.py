"""The picture of a run: displacement over steps, with the band and alpha below it where they were measured.

Draws what metrics.jsonl and eval.jsonl hold, without a display and without pyplot's global state. Called by
`rcpo.training.loop` at the end of a run. Colours are of Okabe and Ito's set, which colour-blind people can
tell apart."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rcpo.common.console import nats, percent
from rcpo.common.files import replacing
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run

if TYPE_CHECKING:  # imported where something is drawn: a run's first step does not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHOSEN, REJECTED, BAND, ALPHA, INK, FAINT = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#222222", "#8a8a8a"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
DPI = 150
SMOOTH_STEPS = 9
"""Training curves are drawn as centred running means over this many steps, with the raw steps behind."""

Rows = list[dict[str, Any]]


def plot_run(run: RunFolder, path: Path) -> None:
    """Write one run's picture: held-out displacement, and where measured the band and alpha under it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    metrics, evals = run.rows(run.metrics), run.rows(run.eval)
    heights = {"displacement": 3.4}
    if any("band/position" in row for row in metrics):
        heights["band"] = 2.2
    if any(row.get("calibration/alpha", 1.0) != 1.0 for row in metrics):
        heights["alpha"] = 1.3
    with rc_context(STYLE):
        figure = Figure(figsize=(8, sum(heights.values()) + 0.9), dpi=DPI, layout="constrained")
        grid = figure.subplots(
            len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights.values())
        )
        axes = dict(zip(heights, grid[:, 0], strict=True))
        draw_displacement(axes["displacement"], metrics, evals)
        axes["displacement"].set_title("Change of log-probability since the start")
        axes["displacement"].legend(loc="best", ncols=3, handlelength=1.6)
        if "band" in axes:
            draw_band(axes["band"], metrics)
        if "alpha" in axes:
            draw_alpha(axes["alpha"], metrics)
        grid[-1, 0].set_xlabel("optimizer step")
        title, name = run_title(run)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
        axes["displacement"].set_title(name, loc="right", color=FAINT, fontsize=8)
        save(figure, path)


def run_title(run: RunFolder) -> tuple[str, str]:
    """Objective and calibration, and the name, from the frozen config; the folder's name where there is
    none."""
    if not run.config.is_file():
        return run.path.name, ""
    _, config = open_run(str(run.path))
    return f"{config.objective['name']}, calibration {config.calibration.name}", str(config.name)


def save(figure: "Figure", path: Path) -> None:
    """PNG or what the suffix says."""
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix[1:])


def column(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have `key`, fp64; infinite values stay infinite."""
    found = [row for row in rows if key in row]
    return np.array([row["step"] for row in found], float), np.array([row[key] for row in found], float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over up to SMOOTH_STEPS finite values, shorter at the ends; nan where there is
    none."""
    half = SMOOTH_STEPS // 2
    windows = [values[max(0, idx - half) : idx + half + 1] for idx in range(len(values))]
    finite = [window[np.isfinite(window)] for window in windows]
    return np.array([window.mean() if len(window) else math.nan for window in finite])


def draw_displacement(axis: "Axes", metrics: Rows, evals: Rows, with_raw: bool = True) -> None:
    """Held-out chosen and rejected displacement with their last values; training batches faint behind, as
    running means and, `with_raw`, one by one."""
    from matplotlib.ticker import MaxNLocator

    axis.axhline(0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ends = []
    for name, colour, marker in (("chosen", CHOSEN, "o"), ("rejected", REJECTED, "s")):
        steps, values = column(metrics, f"displacement/{name}")
        if with_raw:
            axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.18, zorder=2)
        axis.plot(steps, smooth(values), color=colour, linewidth=1.1, alpha=0.45, zorder=3)
        steps, values = column(evals, f"displacement/{name}")
        axis.plot(
            steps, values, color=colour, linewidth=2.2, marker=marker, markersize=5, label=name, zorder=4
        )
        if len(values) and math.isfinite(values[-1]):
            ends.append((values[-1], name, colour))
    _label_ends(axis, ends)
    axis.set_ylabel("displacement (nats)")
    axis.margins(x=0.02)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.plot([], [], color=FAINT, linewidth=1.1, label="training batches")


def _label_ends(axis: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Name and last value at the right edge, in the line's colour, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    gap = 0.075 * (high - low)
    previous = -math.inf
    overlap = max(0.0, gap - (max(ends)[0] - min(ends)[0])) if len(ends) == 2 else 0.0
    for value, name, colour in sorted(ends, key=lambda end: (end[0], end[1] == "chosen")):
        height = max(value - overlap / 2, previous + gap)
        previous = height
        axis.annotate(
            f"{name} {nats(value)}",
            xy=(1, height),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            fontweight="bold",
            annotation_clip=False,
        )


def _band_columns(metrics: Rows) -> tuple[np.ndarray, ...]:
    """Steps that measured the band, and its position, centre, lower and upper edge there."""
    rows = [row for row in metrics if "band/position" in row]
    names = ("position", "center", "lower", "upper")
    return column(rows, "band/position")[0], *(column(rows, f"band/{name}")[1] for name in names)


def draw_band(axis: "Axes", metrics: Rows, limits: tuple[float, float] | None = None) -> None:
    """The disentanglement band, its centre, and where the steps stood; `limits` of the axis where not its
    own.

    Edges beyond the panel are cut there; steps with rho <= 0, where every ratio is inside, are hatched.
    """
    steps, position, center, lower, upper = _band_columns(metrics)
    low, high = limits or band_limits(position, center, lower, upper)
    span, below, above = _steps_as_spans(steps, np.clip(lower, low, high), np.clip(upper, low, high))
    axis.fill_between(span, below, above, color=BAND, alpha=0.2, linewidth=0, label="band")
    _, unbounded = _steps_as_spans(steps, np.isinf(lower) & np.isinf(upper))
    if unbounded.any():
        axis.fill_between(
            span, low, high, where=unbounded, facecolor="none", edgecolor=BAND, hatch="///", alpha=0.35,
            linewidth=0, label="no edges (rho ≤ 0)",
        )  # fmt: skip
    marker = "o" if len(steps) == 1 else ""
    axis.plot(steps, smooth(center), color=BAND, linewidth=1.4, linestyle=(0, (5, 2)), label="centre")
    axis.plot(steps, position, color=INK, linewidth=0.6, alpha=0.3)
    axis.plot(steps, smooth(position), color=INK, linewidth=1.8, label="position", marker=marker)
    _, inside = column(metrics, "band/inside")
    axis.set_ylim(low, high)
    axis.set_ylabel("log incentive ratio")
    axis.set_title(f"Disentanglement band: {percent(inside.mean())} of the measured steps inside")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.6)


def _steps_as_spans(steps: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each step as a span of its own, half a step to either side, so that a single step has a width too."""
    span = np.repeat(steps, 2) + np.tile([-0.5, 0.5], len(steps))
    return span, *(np.repeat(value, 2) for value in values)


def band_limits(
    position: np.ndarray, center: np.ndarray, lower: np.ndarray, upper: np.ndarray
) -> tuple[float, float]:
    """Limits that show every position and centre, and of the finite edges the nearer three quarters: a band
    that is very wide needs no room."""
    middle = np.concatenate([position, center])
    middle = middle[np.isfinite(middle)]
    low, high = (middle.min(), middle.max()) if len(middle) else (-1.0, 1.0)
    finite_low, finite_high = lower[np.isfinite(lower)], upper[np.isfinite(upper)]
    if len(finite_low):
        low = min(low, np.percentile(finite_low, 25))
    if len(finite_high):
        high = max(high, np.percentile(finite_high, 75))
    pad = max(0.08 * (high - low), 0.05)
    return float(low - pad), float(high + pad)


def draw_alpha(axis: "Axes", metrics: Rows) -> None:
    """alpha over steps; above 1 the chosen side is pulled harder and the rejected side pushed less."""
    steps, alpha = column(metrics, "calibration/alpha")
    axis.axhline(1, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axis.plot(steps, alpha, color=ALPHA, linewidth=2, marker="o" if len(steps) == 1 else "")
    axis.set_ylabel("alpha")
    axis.set_title("Calibration: pull on chosen x alpha, push on rejected / alpha")
    axis.margins(y=0.15)
