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

from rcpo.common.console import KEPT_NATS, duration, nats, number
from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.states import CellStatus, State

STYLES = {
    State.RUNNING: "cyan",
    State.PREEMPTED: "yellow",
    State.INTERRUPTED: "yellow",
    State.FAILED: "red",
    State.LOST: "red",
    State.DONE: "green",
}
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
    """One row a cell; `chosen` is the mean change of the held-out chosen log-probability, in nats."""
    has_notes = any(status.reason or status.node for status in statuses)
    table = new_table(console, ["cell", "state"], ["step", "loss", "chosen", "left"])
    if has_notes:
        table.add_column("node, reason", overflow="fold")
    for status in statuses:
        chosen = Text("-")
        if status.chosen is not None and math.isfinite(status.chosen):
            chosen = Text(nats(status.chosen), "red" if status.chosen <= -KEPT_NATS else "green")
        left = status.eta_seconds
        notes = [status.node if status.state is State.RUNNING else None, status.reason]
        table.add_row(
            Text(status.cell.name),
            Text(status.state, STYLES.get(status.state, "dim")),
            step_text(status),
            number(status.loss) if status.loss is not None else "-",
            chosen,
            duration(left) if left is not None and math.isfinite(left) else "-",
            *([Text(" ".join(filter(None, notes)))] if has_notes else []),
        )
    return table


def step_text(status: CellStatus) -> str:
    return f"{status.step}/{'?' if status.num_steps is None else status.num_steps}"


def counts_line(statuses: Sequence[CellStatus]) -> str:
    """How many cells are in each state: 8 cells: 5 done, 3 running."""
    counts = Counter(status.state for status in statuses)
    shown = ", ".join(f"{counts[state]} {state}" for state in reversed(State) if counts[state])
    return f"{len(statuses)} cells: {shown}"


def status_json(sweep: SweepFolder, statuses: Sequence[CellStatus]) -> str:
    """The same for programs; what is unknown or not finite is null."""
    cells = []
    for status in statuses:
        fields: dict[str, Any] = {"name": status.cell.name, "axes": status.cell.axes} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(status).items()
            if key != "cell"
        }
        cells.append(fields | {"run": str(sweep.run(status.cell).path)})
    counts = Counter(str(status.state) for status in statuses)
    return json.dumps({"sweep": str(sweep.path), "counts": counts, "cells": cells}, indent=2)
