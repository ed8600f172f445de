"""What state a cell is in and how far it is: read from its files and a scheduler's queue, if any.

Owns the meaning of the states. Here, on this machine, a cell runs while something holds its run folder's lock
(`rcpo.common.locks`); under a scheduler while the queue says so. Nothing is written.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from rcpo.common.errors import UserError
from rcpo.common.locks import is_held, run_lock
from rcpo.runs.folder import RunFolder
from rcpo.runs.rows import read_last_rows
from rcpo.sweep.folder import Cell, SweepFolder

RECENT_STEPS = 10
"""Loss and speed are means over this many steps: one batch is noisy."""


class State(StrEnum):
    """pending: never started. blocked: pending, and a cell that it starts from has failed. running.
    preempted: stopped with a checkpoint, to go on (exit code 75).
    interrupted: Ctrl-C. failed. lost: run.json says running, but nothing runs it. done."""

    PENDING = "pending"
    BLOCKED = "blocked"
    RUNNING = "running"
    PREEMPTED = "preempted"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    LOST = "lost"
    DONE = "done"


UNFINISHED = frozenset(State) - {State.DONE, State.RUNNING}
"""States of a cell that `rcpo sweep` and `rcpo resume` start."""


@dataclass(frozen=True)
class QueueEntry:
    """What a scheduler says of a cell that it has queued or runs."""

    running: bool
    node: str | None = None
    job: str | None = None


@dataclass(frozen=True)
class CellStatus:
    """One line of `rcpo status`."""

    cell: Cell
    state: State
    step: int
    num_steps: int | None
    """None where that takes the data to know, and no step has been made."""
    loss: float | None
    chosen: float | None
    """Mean change of the held-out chosen log-probability at the last evaluation, in nats."""
    eta_seconds: float | None
    node: str | None
    reason: str | None
    queued: bool = False
    """Whether a scheduler will start it, or runs it."""


def read_status(sweep: SweepFolder, cell: Cell, queue: Mapping[str, QueueEntry] | None) -> CellStatus:
    """The cell's state now. `queue` is what a scheduler says, by the cell's name; None: cells run here."""
    status = status_of(sweep.run(cell), cell, queue)
    return status if status.state is not State.PENDING else _waiting(sweep, status)


def _waiting(sweep: SweepFolder, status: CellStatus) -> CellStatus:
    """What a cell that has not started waits for, where it starts from another one."""
    known = {}
    for name in status.cell.after:
        with contextlib.suppress(UserError):
            known[name] = sweep.run_named(name).read_run().get("status")
    waits = [name for name in status.cell.after if known.get(name) != "done"]
    if not waits:
        return status
    if failed := next((name for name in waits if known.get(name) == "failed"), None):
        reason = (
            f"starts from {waits[0]}{f' and so from {failed}' if failed != waits[0] else ''}, which failed"
        )
        return dataclasses.replace(status, state=State.BLOCKED, reason=reason)
    return dataclasses.replace(status, reason=f"waits for {waits[0]}")


def status_of(run: RunFolder, cell: Cell, queue: Mapping[str, QueueEntry] | None = None) -> CellStatus:
    """The same of a run folder wherever it lies, under the cell's name."""
    try:
        known = run.read_run()
    except UserError as error:
        known = {"status": "failed", "exit_reason": str(error)}
    entry = None if queue is None else queue.get(cell.name)
    runs = is_held(run_lock(run.path)) if queue is None else entry is not None and entry.running
    state = _state(known.get("status", "pending"), runs)
    rows = read_last_rows(run.metrics)
    step = int(rows[-1]["step"]) if rows else 0
    num_steps = _num_steps(run, rows)
    recent = rows[-RECENT_STEPS:]
    eta = None
    if state is State.RUNNING and num_steps is not None and recent:
        eta = (num_steps - step) * _mean(recent, "speed/step_seconds")
    node = entry.node if entry is not None else known.get("host") if state is State.RUNNING else None
    # At step 0 the change is 0 by definition.
    evaluations = [row for row in read_last_rows(run.eval) if row["step"] > 0]
    return CellStatus(
        cell=cell,
        state=state,
        step=step,
        num_steps=num_steps,
        loss=_mean(recent, "train/loss") if recent else None,
        chosen=evaluations[-1].get("displacement/chosen") if evaluations else None,
        eta_seconds=eta,
        node=node,
        reason=None if state in (State.RUNNING, State.PENDING) else known.get("exit_reason"),
        queued=entry is not None,
    )


def _state(status: str, runs: bool) -> State:
    """The state of a cell whose run.json says `status`."""
    if status == "done":
        return State.DONE
    if runs:
        return State.RUNNING
    return State.LOST if status == "running" else State(status)


def _num_steps(run: RunFolder, rows: list[dict[str, Any]]) -> int | None:
    """Optimizer steps of the whole run, from its config or, for epochs, from how far one step goes."""
    steps, epochs = _length(run.config)
    if steps is not None or epochs is None or not rows:
        return steps
    steps_per_epoch = float(rows[-1]["step"]) / float(rows[-1]["train/epoch"])
    return max(1, math.ceil(epochs * steps_per_epoch - 1e-6))


@functools.lru_cache(maxsize=4096)
def _length(config: Path) -> tuple[int | None, float | None]:
    """train.steps and train.epochs of a frozen config; it never changes."""
    try:
        train = yaml.load(config.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["train"]
        return train["steps"], train["epochs"]
    except (OSError, yaml.YAMLError, TypeError, KeyError):
        return None, None


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    values = [float(row[key]) for row in rows if key in row]
    return sum(values) / len(values) if values else math.nan
