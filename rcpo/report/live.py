"""What runs are doing now: one line a run, from run.json and the new rows of metrics.jsonl and eval.jsonl.

Reads only what has been added since it last looked, so that watching a long sweep costs nothing. Called by
`rcpo.commands.watch`.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from rcpo.common.console import KEPT_NATS, date_below, duration, fitted, nats, number
from rcpo.common.errors import UserError
from rcpo.comparison.load import read_settings, read_status
from rcpo.monitor.step_line import RECENT_STEPS
from rcpo.runs.rows import GrowingRows

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=*#@"
SPARK_WIDTH = 14
GAUGE_WIDTH = 13
SILENT_SECONDS = 600
"""A running run that has written nothing for so long is said to be silent."""
ENDED = ("done", "failed", "interrupted", "preempted", "lost")
COLOURS = {
    "done": "green",
    "failed": "red",
    "lost": "red",
    "running": "cyan",
    "interrupted": "yellow",
    "preempted": "yellow",
}
COLUMNS: tuple[tuple[str, int, Literal["left", "right"]], ...] = (
    ("run", 0, "left"),
    ("status", 1, "left"),
    ("step", 2, "right"),
    ("chosen", 3, "right"),
    ("batches", 9, "left"),
    ("held out", 6, "right"),
    ("alpha", 7, "right"),
    ("alpha so far", 10, "left"),
    ("band", 5, "left"),
    ("pairs/s", 8, "right"),
    ("left", 4, "right"),
)
"""Title, rank (the highest is left out first where a terminal is narrow) and side."""
LONGEST_NAME = 22
"""Columns of a run's name on a narrow terminal before it goes on in the next line."""
WIDE_ENOUGH = 110
"""Columns of a terminal that is not narrow."""
KEPT = ("displacement/chosen", "calibration/alpha")


class LiveRun:
    """One run folder, read again at every `look`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status = "unknown"
        self.reason: str | None = None
        self.num_steps: int | None = None
        self.last: dict[str, float] = {}
        """The last value of every key of metrics.jsonl."""
        self.held_out: dict[str, float] = {}
        """The last row of eval.jsonl."""
        self.history: dict[str, list[float]] = {key: [] for key in KEPT}
        self._steps = GrowingRows(path / "metrics.jsonl")
        self._evaluations = GrowingRows(path / "eval.jsonl")

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def trouble(self) -> str | None:
        """Why it failed, or why nothing is known of it."""
        return self.reason if self.status in ("failed", "lost", "unknown") else None

    def look(self) -> None:
        """Take in what is new. A folder that is being written or damaged keeps what was known of it."""
        try:
            settings = read_settings(self.path / "config.yaml")
            self.status, self.reason = read_status(self.path / "run.json")
            steps = settings.get("train.steps")
            self.num_steps = steps if isinstance(steps, int) else None
        except UserError as error:
            self.reason = str(error)
        come_again, rows = self._steps.read_new()
        if come_again:
            self.history = {key: [] for key in KEPT}
        for row in rows:
            self.last |= row
            for key in KEPT:
                if key in row:
                    self.history[key].append(row[key])
        for row in self._evaluations.read_new()[1]:
            self.held_out = row

    def silent_seconds(self) -> float:
        """Since metrics.jsonl was last written; 0 where it is not there."""
        try:
            return max(0.0, time.time() - (self.path / "metrics.jsonl").stat().st_mtime)
        except OSError:
            return 0.0


class Board:
    """All runs as a table, as wide as the console."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.runs = [LiveRun(path) for path in paths]

    def look(self) -> None:
        for run in self.runs:
            run.look()

    def all_ended(self) -> bool:
        return all(run.has_ended for run in self.runs)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        counts = Counter(run.status for run in self.runs)
        yield Text(", ".join(f"{num} {status}" for status, num in counts.most_common()), style="bold")
        num_lines = 6 + sum(run.trouble is not None for run in self.runs)
        height = max(1, options.max_height - num_lines) if console.is_terminal else len(self.runs)
        shown = sorted(self.runs, key=lambda run: run.status != "running")[:height]
        shown = [run for run in self.runs if run in shown]
        table, _ = fitted(
            console,
            range(len(COLUMNS)),
            lambda columns: _table(shown, columns, options.ascii_only, options.max_width < WIDE_ENOUGH),
            lambda column: COLUMNS[column][1],
            options.max_width,
        )
        yield table
        for run in shown:
            if run.trouble is not None:
                yield Text(f"{run.path.name}: {run.trouble}", style="red")
        if len(shown) < len(self.runs):
            yield Text(f"{len(self.runs) - len(shown)} more: make the window higher", style="dim")


def _table(runs: Sequence[LiveRun], columns: Sequence[int], ascii_only: bool, folds: bool) -> Table:
    """`folds`: long names go on in the next line."""
    table = Table(
        box=box.ASCII if ascii_only else box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0),
        pad_edge=False, show_edge=False,
    )  # fmt: skip
    for column in columns:
        title, _, justify = COLUMNS[column]
        name = column == 0 and folds
        longest = min(LONGEST_NAME, max((len(run.path.name) for run in runs), default=1)) if name else None
        table.add_column(title, no_wrap=not name, justify=justify, overflow="fold", max_width=longest)
    bars, mark = (ASCII_BARS, "o") if ascii_only else (BARS, "●")
    for run in runs:
        texts = run_texts(run, bars, mark)
        if folds:
            texts[0] = Text(date_below(run.path.name))
        table.add_row(*(texts[column] for column in columns))
    return table


def run_texts(run: LiveRun, bars: str, mark: str) -> list[Text]:
    """Under `COLUMNS`; empty where nothing is known."""
    last, chosen = run.last, run.history["displacement/chosen"]
    status = Text(run.status, style=COLOURS.get(run.status, "dim"))
    if run.status == "running" and run.silent_seconds() > SILENT_SECONDS:
        status = Text(f"silent {duration(run.silent_seconds())}", style="red")
    step = f"{int(last.get('step', 0))}"
    total = f"/{run.num_steps}" if run.num_steps is not None else ""
    recent = float(np.mean(chosen[-RECENT_STEPS:])) if chosen else math.nan
    speed = last.get("speed/pairs_per_second", math.nan)
    known_alpha = last.get("calibration/alpha", math.nan)
    return [
        Text(run.path.name),
        status,
        Text(f"{step}{total}"),
        _coloured(recent),
        Text(sparkline(chosen, bars)),
        _coloured(run.held_out.get("displacement/chosen", math.nan)),
        Text("" if math.isnan(known_alpha) else f"{known_alpha:.3f}"),
        Text(sparkline(run.history["calibration/alpha"], bars)),
        Text(gauge(last, mark)),
        Text("" if math.isnan(speed) else number(speed)),
        Text(_left(run)),
    ]


def _coloured(change: float) -> Text:
    if math.isnan(change):
        return Text("")
    return Text(nats(change), style="red" if change <= -KEPT_NATS else "green")


def _left(run: LiveRun) -> str:
    """Time to the last step at the speed of the last one."""
    seconds, step = run.last.get("speed/step_seconds"), run.last.get("step")
    if run.status != "running" or None in (seconds, step, run.num_steps):
        return ""
    assert seconds is not None
    assert step is not None
    assert run.num_steps is not None
    return duration(max(0.0, (run.num_steps - step) * seconds))


def sparkline(values: Sequence[float], bars: str) -> str:
    """Means of `SPARK_WIDTH` equal parts of the values as bars between the lowest and the highest."""
    finite = np.array([value for value in values if math.isfinite(value)])
    if not len(finite):
        return ""
    means = np.array([part.mean() for part in np.array_split(finite, min(SPARK_WIDTH, len(finite)))])
    low, high = means.min(), means.max()
    if high - low < 1e-9:
        return bars[0] * len(means)
    heights = np.minimum((means - low) / (high - low) * len(bars), len(bars) - 1).astype(int)
    return "".join(bars[height] for height in heights)


def gauge(row: dict[str, Any], mark: str) -> str:
    """Where the position stands between the band's edges "[" and "]"; "open" where it has none."""
    position, lower, upper = (row.get(f"band/{name}", math.nan) for name in ("position", "lower", "upper"))
    if math.isinf(lower) and math.isinf(upper):
        return "open".center(GAUGE_WIDTH)
    half = (upper - lower) / 2
    if not math.isfinite(position) or not half > 0:
        return ""
    middle, edge = GAUGE_WIDTH // 2, GAUGE_WIDTH // 2 - 2
    track = [" "] * GAUGE_WIDTH
    track[middle - edge], track[middle + edge] = "[", "]"
    place = middle + round(edge * (position - (lower + upper) / 2) / half)
    track[min(max(place, 0), GAUGE_WIDTH - 1)] = mark
    return "".join(track)
