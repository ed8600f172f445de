"""The figures of the report for a paper: one column wide (3.25 in), vector in PDF, told apart without colour.

One file a figure and captions.txt, whose lines say for each what the report's caption says: units, n and what
is shaded. Drawn without a display and without pyplot's global state.
"""

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Picture
from matplotlib.patches import Patch

from rcpo.common.console import percent
from rcpo.common.files import replacing
from rcpo.comparison.groups import Comparison, Group, panels
from rcpo.report import figures
from rcpo.report.curves import (
    COSINE_EDGES,
    NUM_PARTS,
    PATHWAYS,
    alpha_curve,
    band_curve,
    band_range,
    cosine_shares,
    held_out_curve,
    pair_points,
    pathway_shares,
)
from rcpo.report.palette import (
    BAND,
    FAINT,
    INK,
    NEGATIVE,
    NEUTRAL,
    PATHWAY_COLOURS,
    PATHWAY_HATCHES,
    POSITIVE,
    looks,
)

WIDTH_INCHES = 3.25
DPI = 300
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 2.5,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,  # TrueType: publishers refuse type 3 fonts
}


def write_figures(comparison: Comparison, folder: Path, suffix: str) -> list[Path]:
    """Every figure of the report as FOLDER/NAME.SUFFIX ("pdf" or "png"), and captions.txt; OSError where that
    cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    written, captions = [], []
    with rc_context(STYLE):
        for name, caption, picture in _pictures(comparison):
            path = folder / f"{name}.{suffix}"
            with replacing(path) as beside:
                picture.savefig(beside, dpi=DPI, format=suffix)
            written.append(path)
            captions.append(f"{path.name}: {caption}\n")
    (folder / "captions.txt").write_text("".join(captions), encoding="utf-8")
    return written


Draw = Callable[[Sequence[Group]], Picture]


def _pictures(comparison: Comparison) -> Iterator[tuple[str, str, Picture]]:
    """(file name, caption, picture) of all figures."""
    heat = figures.heat_map(comparison)
    if heat is None:
        return
    yield "displacement-grid", f"{heat.title}: {heat.caption}", draw_grid(comparison)
    makers: dict[str, tuple[Callable[[Sequence[Group]], figures.Figure | None], Draw]] = {
        "band": (figures.band_figure, draw_band),
        "curves": (figures.curve_figure, draw_curves),
        "pairs": (figures.scatter_figure, draw_pairs),
        "cosine": (figures.cosine_figure, draw_cosine),
        "pathways": (figures.pathway_figure, draw_pathways),
    }
    taken: set[str] = set()
    for label, groups in panels(comparison).items():
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", label)[:80]
        while safe in taken:
            safe += "_"
        taken.add(safe)
        for kind, (describe, draw) in makers.items():
            described = describe(groups)
            if described is not None:
                yield f"{kind}-{safe}", f"{label}: {described.title}. {described.caption}", draw(groups)


def _facets(count: int, height: float, extra: float = 0.3, share: bool = True) -> tuple[Picture, list[Axes]]:
    """A picture of `count` plots, two in a row, each `height` inches high."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    picture = Picture(figsize=(WIDTH_INCHES, rows * height + extra), layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    for axis in grid.flat[count:]:
        axis.remove()
    return picture, list(grid.flat[:count])


def _wrapped(label: str, width: int = 28, most: int = 3) -> str:
    """In lines that leave the plot its room; what is cut stands in the tables."""
    lines = textwrap.wrap(label, width)
    return "\n".join(lines[:most]) + ("…" if len(lines) > most else "")


def draw_grid(comparison: Comparison) -> Picture:
    """The heat map."""
    by_label = panels(comparison)
    spec = figures.heat_map(comparison)
    assert spec is not None
    data = spec.data[0]
    picture = Picture(figsize=(WIDTH_INCHES, 0.5 + 0.3 * len(by_label)), layout="constrained")
    axis = picture.subplots()
    colours = LinearSegmentedColormap.from_list("displacement", [NEGATIVE, NEUTRAL, POSITIVE])
    image = axis.imshow(data["z"], cmap=colours, vmin=data["zmin"], vmax=data["zmax"], aspect="auto")
    for row, texts in enumerate(data["text"]):
        for at, text in enumerate(texts):
            strong = abs(data["z"][row][at]) > 0.75 * data["zmax"]
            axis.text(at, row, text.replace("<br>", "\n"), ha="center", va="center", fontsize=5.5,
                      color="white" if strong else INK)  # fmt: skip
    calibrations = list(dict.fromkeys(group.calibration for groups in by_label.values() for group in groups))
    axis.set_xticks(range(len(calibrations)), calibrations)
    axis.set_yticks(range(len(by_label)), [_wrapped(label) for label in by_label])
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    bar = picture.colorbar(image, label="chosen (nats)")
    bar.set_ticks(data["colorbar"]["tickvals"], labels=data["colorbar"]["ticktext"])
    return picture


def draw_band(groups: Sequence[Group]) -> Picture:
    drawn = [(group, curve) for group in groups if (curve := band_curve(group)) is not None]
    low, high = band_range([curve for _, curve in drawn])
    picture, axes = _facets(len(drawn), 1.2)
    for axis, (group, curve) in zip(axes, drawn, strict=True):
        below, above = np.clip(curve.lower, low, high), np.clip(curve.upper, low, high)
        axis.fill_between(curve.x, below, above, color=BAND, alpha=0.25, linewidth=0, label="band")
        axis.plot(curve.x, curve.center, color=BAND, linestyle="--", label="centre")
        axis.plot(curve.x, curve.position, color=INK, label="position")
        axis.set_ylim(low, high)
        axis.set_title(f"{group.calibration}: {percent(curve.share_inside)} inside")
        _label_outer(axis, "optimizer step", r"$\log\, d_w / d_l$")
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return picture


def _label_outer(axis: Axes, x: str, y: str) -> None:
    """Titles at the left and lower edge of the picture only, where plots share their axes."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.label_outer()


def draw_curves(groups: Sequence[Group]) -> Picture:
    picture, axes = _facets(4, 1.2, share=False)
    look = looks(group.calibration for group in groups)
    for group in groups:
        own = look[group.calibration]
        curves = [held_out_curve(group, name) for name in ("chosen", "rejected", "margin")]
        for idx, (axis, curve) in enumerate(zip(axes, [*curves, alpha_curve(group)], strict=True)):
            mark = own.mark[1] if idx < 3 else ""
            axis.plot(curve.x, curve.mean, color=own.colour, linestyle=own.dash[1], marker=mark,
                      label=group.calibration)  # fmt: skip
            axis.fill_between(
                curve.x, curve.mean - curve.error, curve.mean + curve.error, color=own.colour, alpha=0.2,
                linewidth=0,
            )  # fmt: skip
    for axis, name in zip(axes, ("chosen (nats)", "rejected (nats)", "margin (nats)", "alpha"), strict=True):
        axis.axhline(1 if name == "alpha" else 0, color=FAINT, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
        axis.set_ylabel(name)
        axis.set_xlabel("optimizer step")
    for axis in axes[:2]:
        axis.set_xlabel("")
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return picture


def draw_pairs(groups: Sequence[Group]) -> Picture:
    drawn = [(group, points) for group in groups if (points := pair_points(group)) is not None]
    look = looks(group.calibration for group in groups)
    picture, axes = _facets(len(drawn), 1.3, extra=0.1)
    for axis, (group, points) in zip(axes, drawn, strict=True):
        own = look[group.calibration]
        axis.scatter(
            points.r_l, points.r_w, s=3, color=own.colour, marker=own.mark[1], alpha=0.6, linewidths=0.3
        )
        axis.axhline(0, color=FAINT, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
        axis.axline((0, 0), slope=1, color=FAINT, linewidth=0.6, zorder=0)
        axis.set_title(
            f"{group.calibration}: {percent(float((points.r_w < 0).mean()))} fell, n = {points.num_pairs}"
        )
        _label_outer(axis, "rejected (nats)", "chosen (nats)")
    return picture


def draw_cosine(groups: Sequence[Group]) -> Picture:
    picture, (axis,) = _facets(1, 1.6, extra=0.2)
    look = looks(group.calibration for group in groups)
    for group in groups:
        shares = cosine_shares(group)
        if shares is not None:
            own = look[group.calibration]
            axis.stairs(
                shares, COSINE_EDGES, color=own.colour, linestyle=own.dash[1], label=group.calibration
            )
    axis.set_xlim(-1, 1)
    axis.set_xlabel("cosine of the score vectors, rho")
    axis.set_ylabel("share of steps")
    picture.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return picture


def draw_pathways(groups: Sequence[Group]) -> Picture:
    drawn = [(group, shares) for group in groups if (shares := pathway_shares(group)) is not None]
    picture, (axis,) = _facets(1, 1.6, extra=0.3)
    for number, (_, shares) in enumerate(drawn):
        x = number * (NUM_PARTS + 1) + np.arange(NUM_PARTS)
        bottom = np.zeros(NUM_PARTS)
        for share, colour, hatch in zip(shares.T, PATHWAY_COLOURS, PATHWAY_HATCHES, strict=True):
            axis.bar(
                x, share, bottom=bottom, width=0.9, color=colour, hatch=hatch, edgecolor="white", linewidth=0
            )
            bottom += share
    middles = [number * (NUM_PARTS + 1) + (NUM_PARTS - 1) / 2 for number in range(len(drawn))]
    axis.set_xticks(middles, [group.calibration for group, _ in drawn])
    axis.tick_params(axis="x", length=0)
    axis.set_xlabel("quarters of training, by calibration")
    axis.set_ylabel("share of steps")
    patches = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name)
        for name, colour, hatch in zip(PATHWAYS, PATHWAY_COLOURS, PATHWAY_HATCHES, strict=True)
    ]
    picture.legend(handles=patches, loc="outside upper center", ncols=2)
    return picture
