"""The console, and how numbers are written for people. Knows nothing of what is said."""

import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from rcpo.common.doing import done_doing

Column = TypeVar("Column")

KEPT_NATS = 0.1
"""A mean change of log-probability smaller than this is called none."""
NOISE_MARK = "~"
"""Behind a mean change that rounding alone may have made."""
UNLIMITED = 10_000
"""Columns of a console that cuts nothing."""
LONGEST_DATED = 20
"""Letters of a name that keeps its date in its line."""
DATE = re.compile(r"-(?=\d{8}-\d{6}\b)")


class RunConsole(Console):
    """stdout: colours and a live line on a terminal, and no escape code anywhere else, whatever the
    environment asks for."""

    def __init__(self, in_colour: bool = False) -> None:
        """`in_colour` asks for colours where there is no terminal."""
        force = True if in_colour else None if sys.stdout.isatty() else False
        super().__init__(force_terminal=force, highlight=False)

    def print(self, *objects: Any, **settings: Any) -> None:
        """As rich's, in place of what was being done (`rcpo.common.doing`)."""
        done_doing()
        super().print(*objects, **settings)

    def on_broken_pipe(self) -> None:
        """Rich would exit here; the run goes on instead, and says nothing more."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fitted(
    console: Console,
    columns: Sequence[Column],
    make: Callable[[Sequence[Column]], Table],
    rank: Callable[[Column], float],
    width: int | None = None,
) -> tuple[Table, list[Column]]:
    """The table of as many of `columns` as fit into `width`, by default the console's, and which those are.
    The column of the highest rank is left out first; one is always there."""
    kept, width = list(columns), console.width if width is None else width
    table, unlimited = make(kept), console.options.update(width=UNLIMITED)
    while kept[1:] and console.measure(table, options=unlimited).maximum > width:
        kept.remove(max(kept, key=rank))
        table = make(kept)
    return table, kept


@contextlib.contextmanager
def passes_shown(console: Console, what: str, num_pairs: int) -> Iterator[Callable[[int], None]]:
    """`work_shown` of "passes of N pairs", say."""
    with work_shown(console, f"{what} of", num_pairs, "pairs") as advance:
        yield advance


@contextlib.contextmanager
def work_shown(console: Console, what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """On a terminal a bar over `total` units while it is open, elsewhere one line; gives the function to call
    with how many more are done."""
    if not console.is_interactive:
        console.print(f"{what} {total} {unit}", soft_wrap=True)
        yield lambda num_done: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda num_done: progress.advance(task, num_done)


def date_below(name: str) -> str:
    """A long name with the date that ends it, as rcpo makes them, in a second line: a table is less wide."""
    return DATE.sub("-\n", name) if len(name) > LONGEST_DATED else name


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable: 0.51, 12.3, 4821."""
    if not math.isfinite(value) or (value != 0 and not 1e-3 <= abs(value) < 1e6):
        return f"{value:.2g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def nats(value: float) -> str:
    """Signed, two decimals; what rounds to zero is +0.00."""
    return f"{round(value, 2) + 0.0:+.2f}"


def above_noise(value: float, floor: float | None) -> str:
    """`nats`, with `NOISE_MARK` behind a value within the noise floor."""
    return nats(value) + (NOISE_MARK if floor is not None and abs(value) < floor else "")


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def duration(seconds: float) -> str:
    """M:SS, or H:MM:SS from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
