"""Run cells on this machine: some at a time, each `rcpo resume CELL` in a process of its own.

Owns the processes' lives and what is shown meanwhile. A cell that fails stops no other one. The first Ctrl-C
(or SIGTERM) asks the cells to write a checkpoint and end, the second ends them; `rcpo resume SWEEP` goes on.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from enum import Enum, auto
from types import FrameType
from typing import Protocol

from rich.console import Group
from rich.live import Live
from rich.text import Text

from rcpo.common.console import RunConsole, duration, nats
from rcpo.common.errors import StoppedError, UserError
from rcpo.common.locks import HeldError, hold, is_held, run_lock
from rcpo.ranks.environment import joined_world_size
from rcpo.runs.folder import RunFolder, now
from rcpo.sweep.folder import Cell, SweepFolder
from rcpo.sweep.states import UNFINISHED, CellStatus, State, read_status
from rcpo.sweep.table import counts_line, status_table

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_BETWEEN_TABLES = 1.0
LOG_NAME = "console.log"


@contextlib.contextmanager
def sweep_held(sweep: SweepFolder) -> Iterator[None]:
    """Be the one process that runs this sweep folder; UserError where another does."""
    with contextlib.ExitStack() as stack:
        try:
            sweep.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(sweep.lock))
        except HeldError as error:
            raise UserError(
                f"{sweep.path}: is being run by {error}; look at it with `rcpo status {sweep.path}`"
            ) from None
        except OSError as error:
            raise UserError(f"{sweep.path}: cannot be made ({error.strerror}); type --out FOLDER") from None
        yield


def run_unfinished(sweep: SweepFolder, num_parallel: int, names: Collection[str] | None = None) -> int:
    """Start every cell (of `names`, where they are given) that is neither done nor running; returns the exit
    code: 0 when all of them are done, 1 when one is not, 130 or 75 after Ctrl-C or SIGTERM. Call with the
    sweep held."""
    cells = [cell for cell in sweep.read_cells() if names is None or cell.name in set(names)]
    statuses = [read_status(sweep, cell, None) for cell in cells]
    return run_cells(sweep, _Listed(sweep, statuses), num_parallel, statuses)


class Later(Enum):
    """No cell now; ask again."""

    LATER = auto()


class Waiting(Protocol):
    """The cells that are to run, one after another."""

    num: int
    """How many there are, as far as is known."""

    def next(self) -> "Cell | Later | None":
        """The next one to start; LATER while all that are left wait for others; None when there is none left.
        It is not asked again then."""

    def ended(self, status: CellStatus) -> None:
        """Take note of what became of one."""

    def last_words(self, statuses: Sequence[CellStatus]) -> tuple[list[str], bool]:
        """What is said when all is over, and whether all is well."""


def run_cells(
    sweep: SweepFolder, waiting: Waiting, num_parallel: int, statuses: Sequence[CellStatus] | None = None
) -> int:
    """Run cells as they come; `statuses` are those to show from the start, by default of all cells there
    are. Exit codes as of `run_unfinished`."""
    if joined_world_size() is not None:
        raise UserError("a sweep starts its own processes; start it without torchrun or srun")
    if statuses is None:
        statuses = [read_status(sweep, cell, None) for cell in sweep.read_cells()]
    return _Runner(sweep, statuses, num_parallel, waiting).run()


class _Listed:
    """Cells of a grid, known from the start."""

    def __init__(self, sweep: SweepFolder, statuses: Sequence[CellStatus]) -> None:
        self._sweep = sweep
        self._cells = [status.cell for status in statuses if status.state in UNFINISHED]
        self.num = len(self._cells)
        self._running = set[str]()

    def next(self) -> Cell | Later | None:
        """The first whose start is there. One whose start has ended without being done is left out."""
        for cell in list(self._cells):
            if self._waits(cell):
                continue
            self._cells.remove(cell)
            if not self._lacks_start(cell):
                self._running.add(cell.name)
                return cell
        return Later.LATER if self._cells else None

    def _waits(self, cell: Cell) -> bool:
        """Whether what it starts from runs, or will."""
        if not cell.after:
            return False
        start = cell.after[0]
        return (
            start in self._running
            or any(start == other.name for other in self._cells)
            or is_held(run_lock(self._sweep.run_named(start).path))
        )

    def _lacks_start(self, cell: Cell) -> bool:
        return bool(cell.after) and self._sweep.run_named(cell.after[0]).read_run().get("status") != "done"

    def ended(self, status: CellStatus) -> None:
        """What starts from it may start now."""
        self._running.discard(status.cell.name)

    def last_words(self, statuses: Sequence[CellStatus]) -> tuple[list[str], bool]:
        left = [status for status in statuses if status.state is not State.DONE]
        lines = [f"`rcpo resume {self._sweep.path}` goes on with the cells that are not done"] if left else []
        return lines, not left


class _Runner:
    """The cells of one sweep while they run."""

    def __init__(
        self, sweep: SweepFolder, statuses: Sequence[CellStatus], num_parallel: int, waiting: Waiting
    ) -> None:
        self._sweep, self._num_parallel, self._waiting = sweep, num_parallel, waiting
        self._statuses = {status.cell.name: status for status in statuses}
        self._is_exhausted = False
        self._running: dict[str, _Child] = {}
        self._received: list[int] = []
        self._console = RunConsole()
        self._num_started, self._num_to_run = 0, waiting.num

    def run(self) -> int:
        with self._signals_heard(), self._shown() as live:
            shown = 0.0
            while not (self._is_exhausted or self._received) or self._running:
                self._fill()
                self._pass_on_signals()
                self._collect()
                if live is not None and time.monotonic() - shown >= SECONDS_BETWEEN_TABLES:
                    live.update(self._table(), refresh=True)
                    shown = time.monotonic()
                time.sleep(SECONDS_BETWEEN_LOOKS)
            if live is not None:
                live.update(self._table(), refresh=True)
        return self._conclude()

    def _fill(self) -> None:
        """Start cells while there is room and there are any."""
        while not (self._is_exhausted or self._received) and len(self._running) < self._num_parallel:
            cell = self._waiting.next()
            if cell is Later.LATER:
                return
            if cell is None:
                self._is_exhausted = True
            else:
                self._start(cell)

    def _start(self, cell: Cell) -> None:
        self._num_started += 1
        self._running[cell.name] = _Child(cell, self._sweep.run(cell), self._num_parallel)
        self._say(f"{self._num_started}/{self._num_to_run} {cell.name}: started")

    def _collect(self) -> None:
        """Take note of the cells that have ended."""
        for name, child in list(self._running.items()):
            code = child.process.poll()
            if code is None:
                continue
            del self._running[name]
            child.record_death(code, stopping=bool(self._received))
            status = self._statuses[name] = read_status(self._sweep, child.cell, None)
            self._waiting.ended(status)
            chosen = "" if status.chosen is None else f", chosen {nats(status.chosen)} nats"
            reason = "" if status.reason is None else f" ({status.reason})"
            self._say(f"{name}: {status.state}{reason}{chosen}, {duration(child.seconds())}")

    def _conclude(self) -> int:
        """The last words, and the exit code."""
        statuses = [read_status(self._sweep, status.cell, None) for status in self._statuses.values()]
        left = [status for status in statuses if status.state is not State.DONE]
        for status in left:
            if status.state is State.FAILED:
                log = self._sweep.run(status.cell).logs / LOG_NAME
                self._print(f"{status.cell.name}: {status.state}: {status.reason} ({log})")
        blocked = Counter(status.reason for status in left if status.state is State.BLOCKED)
        for reason, count in blocked.items():
            self._print(f"{count} cell{'' if count == 1 else 's'} blocked: each {reason}")
        self._say(counts_line(statuses))  # the last line of the table
        lines, is_well = self._waiting.last_words(statuses)
        for line in lines:
            self._print(line)
        if len(left) < len(statuses):
            self._print(f"`rcpo compare {self._sweep.path}` puts the runs side by side")
        if self._received:
            return 130 if self._received[0] == signal.SIGINT else StoppedError.exit_code
        return 0 if is_well else 1

    @contextlib.contextmanager
    def _signals_heard(self) -> Iterator[None]:
        """While open, signals end the cells instead of this process."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup wants it
            numbers.append(signal.SIGHUP)
        saved = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for child in self._running.values():
                child.kill()
            for number, handler in saved.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def _pass_on_signals(self) -> None:
        """Ask cells that have not been asked to stop; after a second Ctrl-C end them."""
        for child in self._running.values():
            if self._received[1:] and self._received[-1] == signal.SIGINT:
                child.kill()
            elif self._received:
                child.ask_to_stop()

    @contextlib.contextmanager
    def _shown(self) -> Iterator[Live | None]:
        """The live table, on a terminal."""
        if not self._console.is_interactive:
            yield None
            return
        with Live(console=self._console, auto_refresh=False, vertical_overflow="ellipsis") as live:
            yield live

    def _table(self) -> Group:
        for name, child in self._running.items():
            self._statuses[name] = read_status(self._sweep, child.cell, None)
        order = list(self._statuses.values())
        busy = [status for status in order if status.cell.name in self._running]
        room = max(5, self._console.height - 8)
        shown = order if len(order) <= room else [*busy, *(s for s in order if s not in busy)][:room]
        last = counts_line(order)
        if self._received:
            last += "; stopping: waiting for checkpoints (Ctrl-C again ends the cells at once)"
        return Group(status_table(self._console, shown), Text(last))

    def _say(self, line: str) -> None:
        """A line, where there is no table that shows the same."""
        if not self._console.is_interactive:
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


class _Child:
    """The process of one cell."""

    def __init__(self, cell: Cell, run: RunFolder, num_parallel: int) -> None:
        self.cell, self._run = cell, run
        self._started, self._is_asked = time.monotonic(), False
        self._before = run.run_json.read_bytes() if run.run_json.is_file() else b""
        run.logs.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // num_parallel))
        with (run.logs / LOG_NAME).open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rcpo.cli", "resume", str(run.path)],
                env={"OMP_NUM_THREADS": threads} | os.environ,
                start_new_session=True,  # Ctrl-C in a terminal reaches the sweep alone, which passes it on
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def ask_to_stop(self) -> None:
        if not self._is_asked:
            self._is_asked = True
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now; its ranks, if any, end when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def record_death(self, code: int, stopping: bool) -> None:
        """Write to run.json why the process ended, where it could not do so itself."""
        known = self._run.read_run()
        unsaid = self._run.run_json.read_bytes() == self._before or known.get("status") == "running"
        if code == 0 or not unsaid or is_held(run_lock(self._run.path)):  # another process trains it
            return
        if stopping:
            if known.get("status") == "running":
                self._run.update_run(status="interrupted", exit_reason="ended with the sweep", ended=now())
            return
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        said = f": {line}" if (line := self._last_line()) else ""
        self._run.update_run(status="failed", exit_reason=f"ended with {how}{said}"[:500], ended=now())

    def _last_line(self) -> str:
        """The last line that the process wrote."""
        with (self._run.logs / LOG_NAME).open("rb") as log:
            log.seek(self._log_start)
            lines = log.read()[-4096:].decode("utf-8", "replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
