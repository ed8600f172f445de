"""Where a run's numbers go while it runs: metrics.jsonl and eval.jsonl always, the console, and W&B.

Owns how rows are shown and sent. Does not own what they hold (`rcpo.metrics`) or what is said at the end
(`rcpo.report`). Built and called by `rcpo.trainer` on rank 0 alone. The files are the truth: a console that
has gone away or a W&B that fails never stops training.
"""

import atexit
import math
import netrc
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias
from urllib.parse import urlsplit

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rcpo.config.schema import Config
from rcpo.run_folder import RunFolder, config_tree, encode_row

WandbMode: TypeAlias = Literal["online", "offline", "disabled"]

RECENT_STEPS = 10
"""Loss, displacement and speed on the console are means over this many steps: one batch of pairs is noisy."""
SECONDS_BETWEEN_LINES = 2.0
"""Shortest time between two step lines on a console that is not a terminal: fast runs leave short logs."""
INIT_TIMEOUT_SECONDS = 30.0
"""How long W&B may take to answer before the run goes on offline."""

GOING_ON = "going on without it; metrics.jsonl and eval.jsonl have every row"


class Sink(Protocol):
    """Takes rows as they are made."""

    def log_step(self, row: dict[str, float]) -> None:
        """One optimizer step; `step` counts optimizer steps done, from 1."""

    def log_eval(self, row: dict[str, float]) -> None:
        """One evaluation on the held-out pairs: `step` and `displacement/*`, `logps/*` without a prefix."""

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        """The last call; `summary` is `rcpo.report.summarize`'s, empty when the run did not get that far."""


def build_sinks(config: Config, run: RunFolder, num_steps: int, start_step: int) -> list[Sink]:
    """The sinks of a run that goes on from `start_step` optimizer steps done to `num_steps`."""
    console = Console(force_interactive=None if sys.stdout.isatty() else False)
    shown = ConsoleSink(console, num_steps, start_step, config.train.log_every)
    sinks: list[Sink] = [JsonlSink(run), shown]
    mode = wandb_mode(config)
    if mode != "disabled":
        sinks.append(WandbSink(config, run, mode, shown.warn))
    return sinks


class JsonlSink:
    """RUN/metrics.jsonl and RUN/eval.jsonl: appends one line a row, flushed at once. `RunFolder.rows` reads
    them."""

    def __init__(self, run: RunFolder) -> None:
        self._metrics = run.metrics.open("a", encoding="utf-8")
        self._eval = run.eval.open("a", encoding="utf-8")

    def log_step(self, row: dict[str, float]) -> None:
        self._metrics.write(encode_row(row) + "\n")
        self._metrics.flush()

    def log_eval(self, row: dict[str, float]) -> None:
        self._eval.write(encode_row(row) + "\n")
        self._eval.flush()

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        self._metrics.close()
        self._eval.close()


class StepLine:
    """The running state of training as one line, as wide as the console: a bar, then as many parts as fit."""

    def __init__(self, num_steps: int, start_step: int) -> None:
        self.num_steps, self.start_step = num_steps, start_step
        self._step = start_step
        self._recent: deque[dict[str, float]] = deque(maxlen=RECENT_STEPS)
        self._started = time.monotonic()
        self._num_measured = 0
        self._num_inside = 0.0
        self._calibrated = False

    def add(self, row: dict[str, float]) -> None:
        """Take in one optimizer step."""
        self._step = int(row["step"])
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
            (0, _labelled("chosen", nats(chosen), "red" if chosen < -0.1 else "green")),
            (1, _labelled("rejected", nats(rejected))),
            (7, Text("nats", style="dim")),
        ]
        if self._calibrated:
            parts.append((4, _labelled(alpha, f"{self._recent[-1]['calibration/alpha']:.3f}")))
        if self._num_measured:
            parts.append((5, _labelled("in band", percent(self._num_inside / self._num_measured))))
        speed = _labelled("", f"{number(self._mean('speed/pairs_per_second'))} pairs/s")
        return [*parts, (6, speed), (2, _labelled("left", duration(self._seconds_left())))]

    def plain(self) -> str:
        """All parts, in ASCII."""
        return "step " + "  ".join(text.plain for _, text in self.parts())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = self.parts("alpha" if options.ascii_only else "\N{GREEK SMALL LETTER ALPHA}")
        while sum(len(text) + 1 for _, text in parts) - 1 > options.max_width and len(parts) > 1:
            parts.remove(max(parts, key=lambda part: part[0]))
        line = Text(" ", end="").join(text for _, text in parts)
        room = min(40, options.max_width - len(line) - 1)
        grid = Table.grid(padding=(0, 1, 0, 0))
        if room < 5:
            yield Text(line.plain[: options.max_width]) if len(line) > options.max_width else line
            return
        grid.add_row(ProgressBar(self.num_steps, self._step, width=room), line)
        yield grid

    def _mean(self, key: str) -> float:
        values = [row[key] for row in self._recent if key in row]
        return sum(values) / len(values) if values else math.nan

    def _seconds_left(self) -> float:
        done = self._step - self.start_step
        return (time.monotonic() - self._started) / max(1, done) * (self.num_steps - self._step)


class ConsoleSink:
    """A progress line on a terminal; elsewhere (pipe, file, TERM=dumb) plain lines in ASCII.

    There the first and the last step are shown, and between them every `log_every`-th step, at most one in
    `SECONDS_BETWEEN_LINES`. Evaluations are always shown, above the bar where there is one.
    """

    def __init__(self, console: Console, num_steps: int, start_step: int, log_every: int) -> None:
        self._console, self._log_every = console, log_every
        self._line = StepLine(num_steps, start_step)
        self._last_printed = -math.inf
        self._live: Live | None = None
        if console.is_interactive:
            self._live = Live(self._line, console=console, refresh_per_second=4)
            self._live.start()
            atexit.register(self._live.stop)  # a run that dies must not leave the cursor hidden

    def log_step(self, row: dict[str, float]) -> None:
        self._line.add(row)
        if self._live is None and self._is_due(int(row["step"])):
            self._last_printed = time.monotonic()
            self._print(self._line.plain())

    def log_eval(self, row: dict[str, float]) -> None:
        self._print(evaluation_line(row))

    def warn(self, message: str) -> None:
        """One line that the user should see."""
        self._print(f"warning: {message}")

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
        """Print above the bar, or plainly; where the reader has gone away (`rcpo train | head`) stdout
        becomes null."""
        try:
            if self._live is not None:
                self._console.print(Text(line))
            else:
                print(line, file=self._console.file, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def evaluation_line(row: dict[str, float]) -> str:
    """One evaluation in ASCII words."""
    return (
        f"held-out pairs at step {int(row['step'])}: chosen {nats(row['displacement/chosen'])}, "
        f"rejected {nats(row['displacement/rejected'])} nats, accuracy {row['displacement/accuracy']:.2f}, "
        f"chosen fell in {percent(row['displacement/chosen_down'])}"
    )


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable: 0.512, 12.3, 4821."""
    if not math.isfinite(value) or (value != 0 and not 1e-3 <= abs(value) < 1e6):
        return f"{value:.2g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def nats(value: float) -> str:
    """Signed, two decimals; what rounds to zero is +0.00."""
    return f"{round(value, 2) + 0.0:+.2f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def duration(seconds: float) -> str:
    """M:SS, or H:MM:SS from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _labelled(label: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{label} " if label else "", "dim"), (value, style))


def wandb_mode(config: Config) -> WandbMode:
    """online, offline or disabled. `tracking.mode=auto`: $WANDB_MODE, else online where a key is
    configured."""
    if config.tracking.name == "none":
        return "disabled"
    if config.tracking.mode != "auto":
        return config.tracking.mode
    match os.environ.get("WANDB_MODE"):
        case "online" | "offline" | "disabled" as wanted:
            return wanted
    return "online" if _has_wandb_key() else "offline"


def _has_wandb_key() -> bool:
    """Whether W&B would find credentials without asking: environment variables, or the netrc entry of its
    host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    candidates = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in filter(None, candidates):
        try:
            if netrc.netrc(str(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


class WandbSink:
    """One W&B run, whose id lives in RUN/run.json: a resumed run continues it. Local files are in RUN/wandb/.

    Rows go as they are, at W&B's own step = `step` (so that none is taken twice after a resume), evaluations
    under `eval/`; infinities and nan are sent as such. On closing, the summary's values go under `summary/`.
    Console output, code, git state, command line, packages and system statistics are not sent, and no key is
    written. Any failure is one warning; at the start it goes on offline, later without W&B.
    """

    def __init__(self, config: Config, run: RunFolder, mode: WandbMode, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._run: Any = None
        try:
            self._run = _start_wandb(config, run, mode)
        except Exception as error:
            self._fail(error, "trying offline" if mode == "online" else GOING_ON)
            if mode == "online":
                self._retry_offline(config, run)

    def log_step(self, row: dict[str, float]) -> None:
        self._attempt(lambda wandb_run: wandb_run.log(row, step=int(row["step"])))

    def log_eval(self, row: dict[str, float]) -> None:
        named = {key if key == "step" else f"eval/{key}": value for key, value in row.items()}
        self._attempt(lambda wandb_run: wandb_run.log(named, step=int(row["step"])))

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        values = {f"summary/{key}": value for key, value in summary.items() if value is not None}
        self._attempt(lambda wandb_run: wandb_run.summary.update(values))
        self._attempt(lambda wandb_run: wandb_run.finish(exit_code=exit_code))
        self._run = None

    def _retry_offline(self, config: Config, run: RunFolder) -> None:
        try:
            self._run = _start_wandb(config, run, "offline")
        except Exception as error:
            self._fail(error, GOING_ON)

    def _attempt(self, call: Callable[[Any], object]) -> None:
        """Call with the W&B run; after a failure, which is said once, there is none."""
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            self._run = None
            self._fail(error, GOING_ON)

    def _fail(self, error: Exception, consequence: str) -> None:
        first = (str(error).strip().splitlines() or [""])[0]
        self._warn(f"W&B failed ({type(error).__name__}: {first}); {consequence}")


def _start_wandb(config: Config, run: RunFolder, mode: WandbMode) -> Any:
    import wandb  # slow to import, and not needed with tracking=none

    settings = wandb.Settings(
        silent=True,
        console="off",
        symlink=False,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        init_timeout=INIT_TIMEOUT_SECONDS,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    tracking = config.tracking
    started = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group,
        tags=tracking.tags,
        name=config.name,
        id=run.read_run()["wandb_id"],
        resume="allow",
        mode=mode,
        dir=str(run.path),
        config=config_tree(config),
        settings=settings,
    )
    started.define_metric("*", step_metric="step")
    return started
