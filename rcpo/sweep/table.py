"""Cells and their states for people and programs: one table, on a terminal or in a file, and JSON."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rcpo.common.console import KEPT_NATS, duration, fitted, nats, number
from rcpo.runs.folder import RunFolder
from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.states import CellStatus, State

STYLES = {
    State.RUNNING: "cyan",
    State.BLOCKED: "red",
    State.PREEMPTED: "yellow",
    State.INTERRUPTED: "yellow",
    State.FAILED: "red",
    State.LOST: "red",
    State.DONE: "green",
}
RANKS = {"cell": 0, "state": 1, "step": 2, "loss": 5, "chosen": 3, "left": 4, "node": 6}
"""Columns of the table of cells; the highest is left out first where a terminal is narrow."""
NOTES = ("node", "node, reason")
PLAIN_WIDTH = 200
"""Columns of a table that goes to a file or a pipe."""


def new_table(console: Console, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table with these columns, numbers to the right; Markdown where `console` is no terminal."""
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN)
    for head in words:
        table.add_column(head, overflow="fold")
    for head in numbers:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def status_table(console: Console, statuses: Sequence[CellStatus]) -> Table:
    """One row a cell; `chosen` is the mean change of the held-out chosen log-probability, in nats. On a
    terminal as many columns as fit, without reasons; elsewhere all."""
    has_notes = any(status.reason or status.node for status in statuses)
    if console.is_terminal:
        columns = [name for name in RANKS if name != "node" or any(status.node for status in statuses)]
        return fitted(console, columns, lambda names: _table(console, statuses, names), RANKS.__getitem__)[0]
    names = [name for name in RANKS if name != "node"]
    return _table(console, statuses, [*names, "node, reason"] if has_notes else names)


def _table(console: Console, statuses: Sequence[CellStatus], names: Sequence[str]) -> Table:
    words = [name for name in names if name in ("cell", "state")]
    table = new_table(console, words, [name for name in names if name not in (*words, *NOTES)])
    for name in (name for name in names if name in NOTES):
        table.add_column(name, overflow="fold")
    for status in statuses:
        texts = _texts(status)
        table.add_row(*(texts[name] for name in names))
    return table


def _texts(status: CellStatus) -> dict[str, Text]:
    """What a cell has in each column."""
    chosen, left = Text("-"), status.eta_seconds
    if status.chosen is not None and math.isfinite(status.chosen):
        chosen = Text(nats(status.chosen), "red" if status.chosen <= -KEPT_NATS else "green")
    node = status.node if status.state is State.RUNNING else None
    return {
        "cell": Text(status.cell.name),
        "state": Text(status.state, STYLES.get(status.state, "dim")),
        "step": Text(step_text(status)),
        "loss": Text(number(status.loss) if status.loss is not None else "-"),
        "chosen": chosen,
        "left": Text(duration(left) if left is not None and math.isfinite(left) else "-"),
        "node": Text(node or ""),
        "node, reason": Text(" ".join(filter(None, [node, status.reason]))),
    }


def reason_lines(console: Console, statuses: Sequence[CellStatus]) -> list[str]:
    """Below the table of a terminal: why cells have stopped that are not done."""
    if not console.is_terminal:
        return []
    return [f"{each.cell.name}: {each.state}: {each.reason}" for each in statuses if each.reason]


def step_text(status: CellStatus) -> str:
    return f"{status.step}/{'?' if status.num_steps is None else status.num_steps}"


def counts_line(statuses: Sequence[CellStatus]) -> str:
    """How many cells are in each state: 8 cells: 5 done, 3 running."""
    counts = Counter(status.state for status in statuses)
    shown = ", ".join(f"{counts[state]} {state}" for state in reversed(State) if counts[state])
    return f"{len(statuses)} cells: {shown}"


def status_json(
    sweep: SweepFolder, statuses: Sequence[CellStatus], evaluated: Sequence[dict[str, Any]] = ()
) -> str:
    """The same for programs; what is unknown or not finite is null. `evaluated`: what SLURM has evaluated."""
    cells = [cell_json(status, sweep.run(status.cell)) for status in statuses]
    counts = Counter(str(status.state) for status in statuses)
    tree = {"sweep": str(sweep.path), "counts": counts, "cells": cells}
    return json.dumps(tree | ({"evaluation": list(evaluated)} if evaluated else {}), indent=2)


def cell_json(status: CellStatus, run: RunFolder) -> dict[str, Any]:
    """One of them."""
    fields: dict[str, Any] = {"name": status.cell.name, "axes": status.cell.axes} | {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(status).items()
        if key != "cell"
    }
    return fields | {"run": str(run.path)}
