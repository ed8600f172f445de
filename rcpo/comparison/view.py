"""Which columns a table of groups has, in every form: what is told of a group, its numbers, its difference to
off, and what `--with` adds. Those that `--columns` names, or all.

`rcpo.comparison.terminal` leaves out what does not fit; `rcpo.comparison.forms` writes all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcpo.common.errors import UserError
from rcpo.comparison.groups import OF_VISION, Comparison, Group
from rcpo.comparison.joined import Joined
from rcpo.comparison.labels import NONE
from rcpo.comparison.load import one_line
from rcpo.comparison.table import (
    Column,
    GroupLine,
    columns_of,
    difference_p_text,
    difference_text,
    has_own_difference,
    number_text,
    own_difference_text,
)


@dataclass(frozen=True)
class Shown:
    """A column of a table."""

    name: str
    """For `--columns`."""
    head: str
    text: Callable[[GroupLine, str], str]
    """Of a line, with the sign for plus and minus."""
    rank: float
    """The highest is left out first where a terminal is narrow."""
    is_words: bool = False
    """To the left, and folded at spaces."""
    is_joined: bool = False
    """Of the file that `--with` names."""
    value: Callable[[GroupLine], Any] | None = None
    """For programs; by default the text."""

    def plain(self, line: GroupLine) -> Any:
        """The value for CSV and JSON; None where nothing is known."""
        found = self.text(line, "±") if self.value is None else self.value(line)
        return None if isinstance(found, float) and not math.isfinite(found) else found


TOLD = (
    Shown("run", "run", lambda line, pm: line.group.name, 1, True),
    Shown("objective", "objective", lambda line, pm: line.group.objective, 0, True),
    Shown("calibration", "calibration", lambda line, pm: line.group.calibration, 0, True),
    Shown("settings", "settings", lambda line, pm: settings_text(line.group), 2, True),
    Shown("n", "n", lambda line, pm: str(len(line.group.runs)), 7,
          value=lambda line: len(line.group.runs)),
)  # fmt: skip
DATA = Shown("data", "model and data", lambda line, pm: line.group.kind, 0, True)
"""For a table of one piece; elsewhere each kind has a table of its own."""
DIFFERENCE = (
    Shown("vs_off", "vs off", lambda line, pm: difference_text(line), 3,
          value=lambda line: line.flat()["vs_off_chosen"]),
    Shown("p", "p", lambda line, pm: difference_p_text(line), 3.5, value=lambda line: line.group.p_holm),
)  # fmt: skip
RANKS = {
    "chosen": 0, "accuracy": 4, "rejected": 5, "fell": 6, "in_band": 8, "pairs_per_second": 9, "margin": 10,
    "memory_gb": 11, "worst": 12, "loss": 13, **dict.fromkeys(OF_VISION, 2.2),
}  # fmt: skip

TAKEN = tuple(column.name for column in (*TOLD, DATA, *DIFFERENCE)) + tuple(RANKS)
"""Names that a column of `--with` cannot have."""


def settings_text(group: Group) -> str:
    """Further settings that are not the usual ones, as they are typed."""
    return " ".join(f"{key}={value}" for key, value in group.shown.items())


@dataclass(frozen=True)
class View:
    """The columns, and the groups of each kind of data and model."""

    columns: list[Shown]
    kinds: dict[str, list[GroupLine]]
    """Lines by model and data; one entry where all groups have the same."""
    is_selected: bool = False
    """Whether the columns are those that somebody named."""


def make_view(
    lines: Sequence[GroupLine],
    comparison: Comparison,
    names: Sequence[str] | None = None,
    joined: Joined | None = None,
) -> View:
    """What a table shows. Raises UserError for a name in `names` that is no column."""
    kinds: dict[str, list[GroupLine]] = {}
    for line in lines:
        kinds.setdefault(line.group.kind, []).append(line)
    more = [] if joined is None else [_joined_column(name, joined) for name in joined.names]
    every = columns_of(comparison)
    numbers = [_number(column) for column in every]
    more += [
        _own_difference(column)
        for column in every
        if has_own_difference(column.name) and any(column.name in line.group.differences for line in lines)
    ]
    told = [column for column in TOLD if column.name != "settings" or any(line.group.shown for line in lines)]
    columns = [*told, *numbers, *DIFFERENCE, *more]
    if names is None:
        return View(columns, kinds)
    known = {column.name: column for column in [*TOLD, DATA, *columns]}
    return View([_named(name, known, comparison) for name in names], kinds, is_selected=True)


def _number(column: Column) -> Shown:
    return Shown(
        column.name, column.head, lambda line, pm: number_text(line, column, pm), RANKS.get(column.name, 2.1),
        value=lambda line: line.means[column.name][0],
    )  # fmt: skip


def _own_difference(column: Column) -> Shown:
    name = column.name

    def mean(line: GroupLine) -> float | None:
        found = line.group.differences.get(name)
        return None if found is None else found.mean

    return Shown(
        f"vs_off_{name}", f"{column.head} vs off", lambda line, pm: own_difference_text(line, name), 3.2,
        value=mean,
    )  # fmt: skip


def _joined_column(name: str, joined: Joined) -> Shown:
    return Shown(
        name, name, lambda line, pm: joined.text(name, line.group), 2.5, is_joined=True,
        value=lambda line: joined.value(name, line.group),
    )  # fmt: skip


def _named(name: str, known: Mapping[str, Shown], comparison: Comparison) -> Shown:
    """A column, or a setting of the runs by its key."""
    if name in known:
        return known[name]
    keys = {"objective.name", "calibration.name", *comparison.common}
    keys |= {key for group in comparison.groups for key in group.settings}
    if name not in keys:
        raise UserError(
            f"--columns {name}: no such column; choose from {', '.join(known)}, or a setting such as optim.lr"
        )
    return Shown(name, name, lambda line, pm: one_line(line.group.settings.get(name, NONE)), 0, True)
