"""Rank processes on this host: started together, watched, and ended together.

Owns the processes' lives, whose fault it was when one fails, and run.json's last word about that. Every rank
runs `rcpo.launch.worker`; a rank whose launcher has died ends itself. Called by `rcpo.launch.start`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from rcpo.common.errors import StoppedError
from rcpo.ranks.distributed import free_port
from rcpo.ranks.environment import RANK_VARIABLES
from rcpo.ranks.logs import log_path
from rcpo.ranks.stopping import SIGNALS
from rcpo.runs.folder import RunFolder, now

GRACE_SECONDS = 20.0
"""Between asking ranks to end and ending them."""
CHECKPOINT_SECONDS = 3600.0
"""The same after SIGTERM or SIGUSR2, which ask for a checkpoint; SIGKILL is for those in more of a hurry."""
FAULT_FILE = "RCPO_FAULT_FILE"
"""Environment variable of a started rank: where it writes at once why it fails (`rcpo.launch.worker`)."""


@dataclass(frozen=True)
class Fault:
    """Why a rank failed."""

    time: float
    """Seconds since the epoch; 0 where the rank was ended by a signal and could not say."""
    rank: int
    reason: str
    exit_code: int = 1
    """What the rank ended with by itself (`rcpo.common.errors`)."""


class Ending(NamedTuple):
    """How the ranks of a launch ended."""

    exit_code: int
    """0, that of a UserError of a rank (`rcpo.common.errors`), 1 for a fault, or 130 after Ctrl-C."""
    line: str = ""
    """What a user reads of it; empty where all is well."""


class _Ranks:
    """The processes of one launch. As a context: started, and all ended at the end, whatever happens."""

    def __init__(self, run: RunFolder, num_ranks: int, resume: bool, faults: Path) -> None:
        self._run, self._num_ranks, self._resume, self._faults = run, num_ranks, resume, faults
        self.processes: list[subprocess.Popen[bytes]] = []
        self.received: int | None = None
        """The first signal that this process was sent."""
        self._deadline = float("inf")

    def start(self) -> None:
        shared = dict(
            zip(RANK_VARIABLES, ("", str(self._num_ranks), "", "127.0.0.1", str(free_port())), strict=True)
        )
        threads = str(max(1, (os.cpu_count() or 1) // self._num_ranks))
        command = [sys.executable, "-m", "rcpo.launch.worker", str(self._run.path)]
        command += ["--resume"] if self._resume else []
        for number in range(self._num_ranks):
            own = {
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                FAULT_FILE: str(self._faults / str(number)),
            }
            with contextlib.ExitStack() as stack:
                log = None
                if number > 0:
                    log = stack.enter_context(log_path(self._run.logs, number).open("ab"))
                process = subprocess.Popen(
                    command,
                    env={"OMP_NUM_THREADS": threads} | os.environ | shared | own,
                    start_new_session=True,  # Ctrl-C in a terminal reaches this process, which passes it on
                    stdin=subprocess.PIPE,  # never written: its end tells the rank that this process has died
                    stdout=log,
                    stderr=log,
                )
            self.processes.append(process)
        if self.received is not None:  # before there was anyone to pass it on to
            self.forward(self.received)

    def forward(self, number: int, frame: FrameType | None = None) -> None:
        """Pass a signal on to every rank; the ranks decide how to end."""
        if self.received is None:
            patience = GRACE_SECONDS if number == signal.SIGINT else CHECKPOINT_SECONDS
            self.received, self._deadline = number, time.monotonic() + patience
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> None:
        """Until all ranks are done or have stopped, one has failed, or a signal has not ended them in
        time."""
        good = (0, StoppedError.exit_code)
        while time.monotonic() < self._deadline:
            codes = [process.poll() for process in self.processes]
            if all(code in good for code in codes) or any(code not in (None, *good) for code in codes):
                return
            time.sleep(0.05)

    def faults(self) -> list[Fault]:
        """Of the ranks that failed by themselves, the first one first."""
        found = []
        for number, process in enumerate(self.processes):
            file = self._faults / str(number)
            code = process.poll()
            if file.is_file():
                found.append(Fault(rank=number, **json.loads(file.read_text())))
            elif code is not None and code < 0:
                name = signal.Signals(-code).name
                found.append(Fault(0.0, number, f"was ended by signal {-code} ({name})"))
            elif code:
                found.append(Fault(time.time(), number, f"ended with exit code {code}"))
        return sorted(found, key=lambda fault: fault.time)

    def end(self) -> None:
        """Ask the ranks that still run to end, then end them."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()


@contextlib.contextmanager
def _signals_forwarded(ranks: _Ranks) -> Iterator[None]:
    """While open, SIGINT, SIGTERM and SIGUSR2 of this process go to every rank; in a thread, which hears
    none, they stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    saved = {number: signal.signal(number, ranks.forward) for number in (signal.SIGINT, *SIGNALS)}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


def run_ranks(run: RunFolder, num_ranks: int, resume: bool) -> Ending:
    """Start one process a rank on this host and wait; when one fails the others are ended. run.json gets how
    they ended."""
    with tempfile.TemporaryDirectory(prefix="rcpo-") as folder:
        ranks = _Ranks(run, num_ranks, resume, Path(folder))
        with _signals_forwarded(ranks):
            try:
                ranks.start()
                ranks.wait()
                faults = ranks.faults()
            finally:
                ranks.end()
    if all(process.returncode == 0 for process in ranks.processes):
        return Ending(0)
    if ranks.received == signal.SIGINT:
        run.update_run(status="interrupted", exit_reason="SIGINT", ended=now())
        return Ending(130, interrupted_line(run))
    fault, status = _cause(faults, ranks.received), "failed"
    line = fault.reason
    if fault.exit_code == StoppedError.exit_code:
        status = StoppedError.status
    elif fault.exit_code == 1:
        line = f"rank {fault.rank} {fault.reason}; its log is {log_path(run.logs, fault.rank)}"
    reason = fault.reason if fault.exit_code != 1 else f"rank {fault.rank} {fault.reason}"
    run.update_run(status=status, exit_reason=reason, ended=now())
    return Ending(fault.exit_code, line)


def _cause(faults: list[Fault], received: int | None) -> Fault:
    """Of what the ranks failed: the first, but for the signal that was passed on to them."""
    if received is None:
        return faults[0]
    told = [fault for fault in faults if fault.time > 0]
    name = signal.Signals(received).name
    stopped = Fault(0.0, 0, f"stopped by {name} before the first step", StoppedError.exit_code)
    return told[0] if told else stopped


def interrupted_line(run: RunFolder) -> str:
    """What a user reads after Ctrl-C."""
    return f"interrupted; `rcpo resume {run.path}` continues from the newest checkpoint"
