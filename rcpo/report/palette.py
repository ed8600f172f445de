"""Colours, dashes and marks of calibrations: of Okabe and Ito's set, and told apart without colour too."""

from collections.abc import Iterable
from dataclasses import dataclass

INK, FAINT, BAND = "#222222", "#8a8a8a", "#009E73"
NEGATIVE, NEUTRAL, POSITIVE = "#D55E00", "#f7f7f7", "#0072B2"
"""Of the heat map: fell, stayed, rose."""
PATHWAY_COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00")
DESTINATION_COLOURS = ("#D55E00", "#CC79A7", "#332288", "#8a8a8a")
PATHWAY_HATCHES = ("", "//", "..", "xx")


@dataclass(frozen=True)
class Look:
    """As the interactive and the printed figures name it: (plotly, matplotlib) for dash and mark."""

    colour: str
    dash: tuple[str, str]
    mark: tuple[str, str]


_KNOWN = {
    "off": Look("#D55E00", ("solid", "-"), ("circle", "o")),
    "on": Look("#0072B2", ("solid", "-"), ("square", "s")),
    "exact": Look("#009E73", ("dash", "--"), ("diamond", "D")),
    "feedback": Look("#CC79A7", ("dot", ":"), ("triangle-up", "^")),
    "balance": Look("#332288", ("solid", "-"), ("star", "*")),
    "published": Look("#117733", ("dashdot", "-."), ("hexagon", "h")),
    "fixed": Look("#E69F00", ("dashdot", "-."), ("x", "x")),
}
_FURTHER = [
    Look("#56B4E9", ("solid", "-"), ("triangle-down", "v")),
    Look("#000000", ("dash", "--"), ("cross", "P")),
    Look("#8a8a8a", ("dot", ":"), ("star", "*")),
    *_KNOWN.values(),
]


def looks(calibrations: Iterable[str]) -> dict[str, Look]:
    """A look for each label; the plain name of a calibration always has the same one."""
    found: dict[str, Look] = {}
    further = iter(_FURTHER * 100)
    for label in dict.fromkeys(calibrations):
        name = label.split()[0]
        taken = {id(look) for look in found.values()}
        known = _KNOWN.get(name)
        found[label] = known if known is not None and id(known) not in taken else next(further)
    return found
