"""Where probability went: a figure of what `rcpo lab tokens` has left in the folders of compared runs, off
beside the others."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rcpo.common.errors import UserError
from rcpo.comparison.groups import Group
from rcpo.report.figures import Figure
from rcpo.report.palette import DESTINATION_COLOURS

SIDES = ("chosen", "rejected")
NAMES = {
    "opposite": "the other response's token",
    "refusal": "words of refusal",
    "end": "the end of text",
    "others": "other tokens",
}
"""Of the destinations in a file of `rcpo lab tokens`."""
END = "end"
Mass = dict[str, dict[str, float]]
"""By side and destination: probability that a response's own tokens lost to it, where they lost any."""


def destination_figure(groups: Sequence[Group]) -> Figure | None:
    """Bars by calibration and step, stacked by destination, a facet a side; None where no run was looked
    at. Raises UserError for a damaged file."""
    found = [(group, looked) for group in groups if (looked := _of_group(group))]
    if not found:
        return None
    counts = [
        f"{group.calibration} {len([run for run in group.runs if _of_run(run.path)])}" for group, _ in found
    ]
    figure = Figure(
        "Where the probability went",
        "Probability that the response's own tokens lost, summed over a response, by who gained it; means "
        f"over the runs that rcpo lab tokens looked at ({', '.join(counts)}). A part below 0 lost too.",
        facets=[f"{side} responses" for side in SIDES],
    )
    for facet, side in enumerate(SIDES):
        number = "" if facet == 0 else str(facet + 1)
        for (key, name), colour in zip(NAMES.items(), DESTINATION_COLOURS, strict=True):
            bars = [
                (group.calibration, when, mass[side][key])
                for group, looked in found
                for when, mass in looked.items()
            ]
            figure.data.append(
                {
                    "type": "bar", "name": name, "legendgroup": key, "showlegend": facet == 0,
                    "marker": {"color": colour}, "xaxis": f"x{number}", "yaxis": f"y{number}",
                    "x": [[html.escape(label) for label, _, _ in bars], [when for _, when, _ in bars]],
                    "y": [value for *_, value in bars], "hovertemplate": "%{x}: %{y:.3f}",
                }
            )  # fmt: skip
        figure.axes(facet, "", "probability a response")
    figure.layout |= {"barmode": "relative", "bargap": 0.15}
    return figure


def _of_group(group: Group) -> dict[str, Mass]:
    """By checkpoint, those in the order of training and the end last; means over the runs that have it."""
    runs = [_of_run(run.path) for run in group.runs]
    steps = sorted({when for run in runs for when in run}, key=lambda when: (when == END, len(when), when))
    return {when: _mean([run[when] for run in runs if when in run]) for when in steps}


def _of_run(run: Path) -> dict[str, Mass]:
    found = {}
    for file in (run / "lab").glob("tokens-*.json"):
        named = re.fullmatch(r"tokens-(?:step-0*(\d+)|final)\.json", file.name)
        if named is None:
            continue
        try:
            found[f"step {named[1]}" if named[1] else END] = _mass(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{file}: is damaged; remove it, and type rcpo lab tokens {run}") from None
    return found


def _mass(tree: dict[str, Any]) -> Mass:
    """Shares are None where nothing was lost."""
    return {
        side: {key: tree[side]["lost"] * (tree[side]["to"][key]["share"] or 0.0) for key in NAMES}
        for side in SIDES
    }


def _mean(masses: Sequence[Mass]) -> Mass:
    return {side: {key: fmean(mass[side][key] for mass in masses) for key in NAMES} for side in SIDES}
