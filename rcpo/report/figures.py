"""The interactive figures of a comparison, as plain Plotly specifications ({"data", "layout"}).

`report.js` draws them. A figure with `facets` has that many plots side by side or one under another, as the
width of the page allows. Every figure has a caption that says its units, its n and what is shaded.
"""

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rcpo.common.console import nats, percent
from rcpo.comparison.groups import Comparison, Group, panels
from rcpo.comparison.statistics import mean_and_error
from rcpo.report.curves import (
    COSINE_EDGES,
    MAX_POINTS,
    NUM_PARTS,
    PATHWAYS,
    Curve,
    alpha_curve,
    band_curve,
    band_range,
    cosine_shares,
    held_out_curve,
    pair_points,
    pathway_shares,
)
from rcpo.report.palette import BAND, FAINT, INK, NEGATIVE, NEUTRAL, PATHWAY_COLOURS, POSITIVE, looks

LABEL_LETTERS = 22
"""Of a line of the heat map's labels."""
MAX_COUNTS = 6
"""Groups whose numbers of seeds a caption lists."""


@dataclass
class Figure:
    title: str
    caption: str
    data: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    facets: list[str] = field(default_factory=list)
    """Titles; empty for a figure of one plot."""

    def axes(self, facet: int, x: str, y: str, **both: Any) -> None:
        """Titles of facet's axes, and what `both` axes or "x_..." and "y_..." have."""
        number = "" if facet == 0 else str(facet + 1)
        for letter, title in (("x", x), ("y", y)):
            own = {
                key.removeprefix(f"{letter}_"): value
                for key, value in both.items()
                if key.startswith(f"{letter}_")
            }
            self.layout[f"{letter}axis{number}"] = {"title": {"text": title, "standoff": 4}} | own

    def spec(self) -> dict[str, Any]:
        """For `report.js`; numbers that JSON does not have are null."""
        return {
            "data": _plain(self.data),
            "layout": _plain(self.layout),
            "facets": [html.escape(text) for text in self.facets],
        }


def _plain(value: Any) -> Any:
    """Lists, dicts and finite numbers of four significant digits: what a figure can show."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _on(facet: int) -> dict[str, str]:
    number = "" if facet == 0 else str(facet + 1)
    return {"xaxis": f"x{number}", "yaxis": f"y{number}"}


def _rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[idx : idx + 2], 16) for idx in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def seeds_text(groups: Sequence[Group]) -> str:
    """n of each group: "3 seeds each", or group by group."""
    counts = [len(group.runs) for group in groups]
    if len(set(counts)) == 1:
        return f"{counts[0]} seed{'' if counts[0] == 1 else 's'}{' each' if len(groups) > 1 else ''}"
    if len(groups) > MAX_COUNTS:
        return f"{min(counts)} to {max(counts)} seeds each"
    return "seeds: " + ", ".join(f"{group.calibration} {len(group.runs)}" for group in groups)


def pairs_text(groups: Sequence[Group]) -> str:
    numbers = sorted({len(run.pairs.r_w) for group in groups for run in group.runs if run.pairs is not None})
    return f"{' or '.join(map(str, numbers))} held-out pairs" if numbers else "held-out pairs"


def _in_lines(label: str) -> str:
    """A label for an axis, in lines that leave room for the plot."""
    return "<br>".join(
        html.escape(line) for line in textwrap.wrap(label, LABEL_LETTERS, break_on_hyphens=False)
    )


def heat_map(comparison: Comparison) -> Figure | None:
    """Objective x calibration, coloured by the held-out chosen displacement at the end."""
    by_label = panels(comparison)
    if not by_label:
        return None
    calibrations = list(dict.fromkeys(group.calibration for groups in by_label.values() for group in groups))
    values = np.full((len(by_label), len(calibrations)), math.nan)
    texts = [[""] * len(calibrations) for _ in by_label]
    for row, groups in enumerate(by_label.values()):
        for group in groups:
            at = calibrations.index(group.calibration)
            mean, error = mean_and_error([run.evals["displacement/chosen"][-1] for run in group.runs])
            values[row, at] = mean
            spread = "" if math.isnan(error) else f"<br>±{error:.2f}"
            texts[row][at] = f"{nats(mean)}{spread}"
    shown = np.arcsinh(values)
    reach = max(0.1, float(np.nanmax(np.abs(shown))))
    ticks = [
        tick for tick in (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100) if abs(np.arcsinh(tick)) <= reach
    ]
    drawn = [group for groups in by_label.values() for group in groups]
    figure = Figure(
        "Held-out chosen displacement at the end",
        f"nats, mean ± standard error; {seeds_text(drawn)}, {pairs_text(comparison.groups)}. "
        "Colour: orange fell, blue rose, on a scale that is logarithmic away from 0.",
    )
    figure.data.append(
        {
            "type": "heatmap", "z": shown, "x": [_in_lines(name) for name in calibrations],
            "y": [_in_lines(name) for name in by_label], "text": texts, "texttemplate": "%{text}",
            "hovertemplate": "%{y}, %{x}: %{text}<extra></extra>", "zmin": -reach, "zmax": reach,
            "xgap": 2, "ygap": 2,
            "colorscale": [[0, NEGATIVE], [0.5, NEUTRAL], [1, POSITIVE]],
            "colorbar": {
                "title": {"text": "nats"}, "thickness": 12,
                "tickvals": np.arcsinh(ticks), "ticktext": list(map(str, ticks)),
            },
        }
    )  # fmt: skip
    most_lines = 1 + max(_in_lines(name).count("<br>") for name in by_label)
    figure.layout = {
        "height": 90 + len(by_label) * max(46, 15 * most_lines),  # all rows are of one height
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "xaxis": {"side": "top", "type": "category", "showgrid": False, "automargin": True},
        "margin": {"t": 40, "b": 10},
    }  # fmt: skip
    return figure


def band_figure(groups: Sequence[Group]) -> Figure | None:
    """Log incentive ratio in its band, one facet a calibration on one scale: the paper's panel."""
    drawn = [(group, curve) for group in groups if (curve := band_curve(group)) is not None]
    if not drawn:
        return None
    low, high = band_range([curve for _, curve in drawn])
    figure = Figure(
        "Log incentive ratio and the disentanglement band",
        "y: log ratio of the incentives, without unit. Line: where the steps stood; dashed: the band's "
        "centre; shaded: the band, medians of its edges, cut at the frame and open where rho ≤ 0. Over "
        f"{seeds_text([group for group, _ in drawn])}; percentages are of the measured steps.",
    )
    for facet, (group, curve) in enumerate(drawn):
        below, above = np.clip(curve.lower, low, high), np.clip(curve.upper, low, high)
        common = {"type": "scatter", "mode": "lines", "showlegend": facet == 0} | _on(facet)
        edge = {"line": {"width": 0}, "hoverinfo": "skip", "legendgroup": "band"}
        figure.data += [
            common | edge | {"x": curve.x, "y": below, "showlegend": False, "name": "lower edge"},
            common | edge | {
                "x": curve.x, "y": above, "fill": "tonexty", "fillcolor": _rgba(BAND, 0.22), "name": "band",
            },
            common | {
                "x": curve.x, "y": curve.center, "name": "centre", "legendgroup": "centre",
                "line": {"color": BAND, "dash": "dash", "width": 1.5},
            },
            common | {
                "x": curve.x, "y": curve.position, "name": "position", "legendgroup": "position",
                "line": {"color": INK, "width": 2},
            },
        ]  # fmt: skip
        figure.axes(facet, "optimizer step", "log d_w/d_l", y_range=[low, high])
        figure.facets.append(f"{group.calibration}: {percent(curve.share_inside)} inside")
    return figure


def curve_figure(groups: Sequence[Group]) -> Figure:
    """Held-out chosen, rejected and margin, and alpha, over training: one line a calibration."""
    figure = Figure(
        "Displacement, margin and alpha",
        f"Lines: means over {seeds_text(groups)} of {pairs_text(groups)} in nats, and alpha of the training "
        "steps. Shaded: ± standard error over seeds.",
        facets=["chosen (nats)", "rejected (nats)", "margin (nats)", "alpha"],
    )
    look = looks(group.calibration for group in groups)
    for group in groups:
        curves = [held_out_curve(group, name) for name in ("chosen", "rejected", "margin")]
        for facet, curve in enumerate([*curves, alpha_curve(group)]):
            figure.data += _line(curve, group.calibration, look[group.calibration], facet)
    for facet in range(4):
        figure.axes(facet, "optimizer step", "")
        figure.layout.setdefault("shapes", []).append(_level(facet, 1 if facet == 3 else 0))
    figure.layout["hovermode"] = "x unified"
    return figure


def _line(curve: Curve, name: str, look: Any, facet: int) -> list[dict[str, Any]]:
    """A line with its marks, and the shade of its error below it."""
    common = {"type": "scatter", "legendgroup": name, "name": html.escape(name)} | _on(facet)
    line = common | {
        "x": curve.x, "y": curve.mean, "mode": "lines",
        "line": {"color": look.colour, "dash": look.dash[0], "width": 2},
        "showlegend": facet == 0,
    }  # fmt: skip
    if facet < 3:
        line |= {"mode": "lines+markers", "marker": {"symbol": look.mark[0], "size": 5}}
    known = ~np.isnan(curve.error)
    if not known.any():
        return [line]
    x, mean, error = curve.x[known], curve.mean[known], curve.error[known]
    shade = common | {
        "x": np.concatenate([x, x[::-1]]), "y": np.concatenate([mean - error, (mean + error)[::-1]]),
        "mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": _rgba(look.colour, 0.18),
        "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip
    return [shade, line]


def _level(facet: int, height: float) -> dict[str, Any]:
    number = "" if facet == 0 else str(facet + 1)
    return {
        "type": "line", "layer": "below", "xref": f"x{number} domain", "yref": f"y{number}", "x0": 0, "x1": 1,
        "y0": height, "y1": height, "line": {"color": FAINT, "width": 1, "dash": "dash"},
    }  # fmt: skip


def cosine_figure(groups: Sequence[Group]) -> Figure | None:
    """Histogram of rho over the measured steps."""
    drawn = [(group, shares) for group in groups if (shares := cosine_shares(group)) is not None]
    if not drawn:
        return None
    figure = Figure(
        "Cosine of the two sides' score vectors",
        f"x: rho, -1 to 1; y: share of the measured steps in bins of {COSINE_EDGES[1] - COSINE_EDGES[0]:.2f} "
        f"over {seeds_text([group for group, _ in drawn])}. At rho ≤ 0 every ratio is inside the band.",
    )
    look = looks(group.calibration for group in groups)
    for group, shares in drawn:
        own = look[group.calibration]
        figure.data.append(
            {
                "type": "scatter", "mode": "lines", "name": html.escape(group.calibration),
                "x": (COSINE_EDGES[:-1] + COSINE_EDGES[1:]) / 2, "y": shares,
                "line": {"shape": "hvh", "color": own.colour, "dash": own.dash[0]},
                "fill": "tozeroy", "fillcolor": _rgba(own.colour, 0.1),
            }
        )  # fmt: skip
    figure.axes(0, "rho", "share of steps", x_range=[-1, 1], y_tickformat=".0%")
    figure.layout["height"] = 320
    return figure


def pathway_figure(groups: Sequence[Group]) -> Figure | None:
    """What a small gradient step would do to both sides, by calibration and quarter of training."""
    drawn = [(group, shares) for group in groups if (shares := pathway_shares(group)) is not None]
    if not drawn:
        return None
    figure = Figure(
        "Pathways over training",
        f"Share of the measured steps after calibration, by quarter of training, over "
        f"{seeds_text([group for group, _ in drawn])}: what a small plain gradient step does to both sides.",
    )
    quarters = [f"{idx + 1}" for idx in range(NUM_PARTS)]
    for pathway, name in enumerate(PATHWAYS):
        figure.data.append(
            {
                "type": "bar", "name": name, "marker": {"color": PATHWAY_COLOURS[pathway]},
                "x": [
                    [html.escape(group.calibration) for group, _ in drawn for _ in quarters],
                    [quarter for _ in drawn for quarter in quarters],
                ],
                "y": np.concatenate([shares[:, pathway] for _, shares in drawn]),
                "hovertemplate": "%{x}: %{y:.0%}",
            }
        )  # fmt: skip
    figure.axes(0, "quarter of training", "share of steps", y_tickformat=".0%", y_range=[0, 1])
    figure.layout |= {"barmode": "stack", "bargap": 0.08, "height": 380, "margin": {"t": 84, "b": 66}}
    return figure


def scatter_figure(groups: Sequence[Group]) -> Figure | None:
    """Change of chosen against change of rejected, pair by pair, one facet a calibration on one scale."""
    drawn = [(group, points) for group in groups if (points := pair_points(group)) is not None]
    if not drawn:
        return None
    num_pairs = sorted({points.num_pairs for _, points in drawn})
    shown = f", at most {MAX_POINTS} shown" if num_pairs[-1] > MAX_POINTS else ""
    figure = Figure(
        "Displacement, pair by pair",
        f"One mark a held-out pair, mean over {seeds_text([group for group, _ in drawn])}; n = "
        f"{' or '.join(map(str, num_pairs))}{shown}; nats. "
        "Above the dashed line at 0 the chosen response rose, below it fell; above the diagonal the margin "
        "grew.",
    )
    across = _span(np.concatenate([points.r_l for _, points in drawn]))
    up = _span(np.concatenate([points.r_w for _, points in drawn]))
    diagonal = [max(across[0], up[0]), min(across[1], up[1])]
    look = looks(group.calibration for group in groups)
    for facet, (group, points) in enumerate(drawn):
        figure.data.append(
            {
                "type": "scatter", "mode": "markers", "x": points.r_l, "y": points.r_w, "showlegend": False,
                "marker": {
                    "size": 5, "opacity": 0.55, "color": look[group.calibration].colour,
                    "symbol": look[group.calibration].mark[0],
                },
                "text": [f"pair {idx}" for idx in points.index],
                "hovertemplate": "%{text}: rejected %{x:.2f}, chosen %{y:.2f}<extra></extra>",
            } | _on(facet)
        )  # fmt: skip
        figure.axes(facet, "rejected (nats)", "chosen (nats)", x_range=across, y_range=up)
        number = "" if facet == 0 else str(facet + 1)
        figure.layout.setdefault("shapes", []).extend(
            [
                _level(facet, 0),
                {
                    "type": "line", "layer": "below", "xref": f"x{number}", "yref": f"y{number}",
                    "x0": diagonal[0], "x1": diagonal[1], "y0": diagonal[0], "y1": diagonal[1],
                    "line": {"color": FAINT, "width": 1},
                },
            ]
        )  # fmt: skip
        figure.facets.append(f"{group.calibration}: {percent(float((points.r_w < 0).mean()))} fell")
    return figure


def _span(values: np.ndarray) -> list[float]:
    """Limits around `values` and 0."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    pad = 0.05 * (high - low) or 1.0
    return [low - pad, high + pad]


def objective_figures(groups: Sequence[Group]) -> list[Figure]:
    """All figures of one objective, those that its runs measured."""
    makers = (band_figure, curve_figure, scatter_figure, cosine_figure, pathway_figure)
    return [figure for make in makers if (figure := make(groups)) is not None]
