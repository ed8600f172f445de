"""The console while a run trains: a live line on a terminal, plain ASCII lines elsewhere.

Owns the step line and its sink. Does not own the console and how numbers are written (`rcpo.common.console`)
or the report at the end (`rcpo.monitor.summary`). Built by `rcpo.monitor.sinks`, on rank 0 alone. A reader
that goes away (`rcpo train | head`) never stops training."""

import atexit
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rcpo.common.console import KEPT_NATS, above_noise, duration, nats, number, percent
from rcpo.runs.answers import Answer

RECENT_STEPS = 10
"""Loss, displacement and speed are means over this many steps: one batch of pairs is noisy."""
SECONDS_BETWEEN_LINES = 2.0
"""Shortest time between two step lines on a console that is not a terminal: fast runs leave short logs."""


def evaluation_line(row: dict[str, float]) -> str:
    """One evaluation in ASCII words; `NOISE_MARK` stands behind what rounding alone may be."""
    floor = row.get("displacement/noise_floor")
    parts = []
    if "displacement/chosen" in row:
        chosen = above_noise(row["displacement/chosen"], floor)
        parts.append(f"chosen {chosen} ({percent(row['displacement/chosen_down'])} fell)")
    if "displacement/rejected" in row:
        parts.append(f"rejected {above_noise(row['displacement/rejected'], floor)}")
    if "displacement/accuracy" in row:
        parts.append(f"accuracy {row['displacement/accuracy']:.2f}")
    line = f"held-out at step {int(row['step'])}: {', '.join(parts)}"
    return line if floor is None else f"{line}, noise floor {floor:.2g}"


class StepLine:
    """The state of training as one line, as wide as the console: a bar, then as many parts as fit."""

    def __init__(self, num_steps: int, start_step: int) -> None:
        self.num_steps, self.start_step = num_steps, start_step
        self._step = start_step
        self._recent: deque[dict[str, float]] = deque(maxlen=RECENT_STEPS)
        self._first_done = math.nan
        self._num_measured = 0
        self._num_inside = 0.0
        self._calibrated = False

    def add(self, row: dict[str, float]) -> None:
        """Take in one optimizer step."""
        self._step = int(row["step"])
        if not self._recent:
            self._first_done = time.monotonic()
        self._recent.append(row)
        if "band/inside" in row:
            self._num_measured += 1
            self._num_inside += row["band/inside"]
        self._calibrated |= row.get("calibration/alpha", 1.0) != 1.0 or "calibration/position_ema" in row

    def parts(self, alpha: str = "alpha") -> list[tuple[int, Text]]:
        """(rank, text) in reading order; the highest rank is left out first where space is short."""
        parts = [(0, Text(f"{self._step}/{self.num_steps}", style="bold"))]
        if not self._recent:
            return parts
        chosen, rejected = self._mean("displacement/chosen"), self._mean("displacement/rejected")
        parts += [
            (3, _labelled("loss", number(self._mean("train/loss")))),
            (0, _labelled("chosen", nats(chosen), "red" if chosen <= -KEPT_NATS else "green")),
        ]
        if not math.isnan(rejected):
            parts.append((1, _labelled("rejected", nats(rejected))))
        if self._calibrated:
            parts.append((4, _labelled(alpha, f"{self._recent[-1]['calibration/alpha']:.3f}")))
        if self._num_measured:
            parts.append((5, _labelled("in band", percent(self._num_inside / self._num_measured))))
        parts.append((6, _labelled("", f"{number(self._mean('speed/pairs_per_second'))} pairs/s")))
        if self._step > self.start_step + 1:
            parts.append((2, _labelled("left", duration(self._seconds_left()))))
        return parts

    def plain(self) -> str:
        """All parts, in ASCII."""
        return "step " + "  ".join(text.plain for _, text in self.parts())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = self.parts("alpha" if options.ascii_only else "\N{GREEK SMALL LETTER ALPHA}")
        while sum(len(text) + 2 for _, text in parts) - 2 > options.max_width and len(parts) > 1:
            parts.remove(max(parts, key=lambda part: part[0]))
        line = Text("  ").join(text for _, text in parts)
        line.truncate(options.max_width)
        room = min(40, options.max_width - len(line) - 2)
        if room < 5:
            yield line
            return
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row(ProgressBar(self.num_steps, self._step, width=room, complete_style="cyan"), line)
        yield grid

    def _mean(self, key: str) -> float:
        values = [row[key] for row in self._recent if key in row]
        return sum(values) / len(values) if values else math.nan

    def _seconds_left(self) -> float:
        """At the pace so far, evaluations included; without the first step, which also warms up."""
        per_step = (time.monotonic() - self._first_done) / (self._step - self.start_step - 1)
        return per_step * (self.num_steps - self._step)


class ConsoleSink:
    """A live line on a terminal; elsewhere (pipe, file, TERM=dumb) plain lines in ASCII.

    There the first and the last step are shown, and between them every `log_every`-th step, at most one in
    `SECONDS_BETWEEN_LINES`. Evaluations are always shown, above the live line where there is one.
    """

    def __init__(self, console: Console, num_steps: int, start_step: int, log_every: int) -> None:
        self._console, self._log_every = console, log_every
        self._line = StepLine(num_steps, start_step)
        self._last_printed = -math.inf
        self._live: Live | None = None
        if console.is_interactive:
            # What else is printed goes above the line, but only if it would go to this terminal anyway.
            self._live = Live(
                self._line, console=console, refresh_per_second=4, redirect_stderr=sys.stderr.isatty()
            )
            self._live.start()
            atexit.register(self._live.stop)  # a run that dies must not leave the cursor hidden

    def log_step(self, row: dict[str, float]) -> None:
        self._line.add(row)
        if self._live is None and self._is_due(int(row["step"])):
            self._last_printed = time.monotonic()
            self._print(self._line.plain())

    def log_eval(self, row: dict[str, float]) -> None:
        self._print(evaluation_line(row))

    def log_answers(self, answers: Sequence[Answer]) -> None:
        """The log has them: an answer may be long."""

    def log_scores(self, step: int, scores: dict[str, float]) -> None:
        said = ", ".join(f"{task} {value:.3f}" for task, value in scores.items())
        self._print(f"the trained model's answers at step {step}: {said}")

    def alert(self, step: int, line: str) -> None:
        """A warning says it."""

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        if self._live is not None:
            self._live.stop()
            atexit.unregister(self._live.stop)

    def _is_due(self, step: int) -> bool:
        if step in (self._line.start_step + 1, self._line.num_steps):
            return True
        waited = time.monotonic() - self._last_printed
        return step % self._log_every == 0 and waited >= SECONDS_BETWEEN_LINES

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=self._live is None)


def _labelled(label: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{label} " if label else "", "dim"), (value, style))
