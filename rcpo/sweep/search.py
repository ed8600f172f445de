"""`rcpo sweep FILE --search optuna`: a search whose trials are cells of a sweep.

Owns what a trial is: optuna proposes values on the axes, they become a frozen cell of the sweep folder, and
optuna is told the metric of its last evaluation, or that the cell failed. The study is optuna's own, kept in
SWEEP/study.log. A trial that was stopped goes on in its cell. Every trial draws from a seed of its own
number, so that one trial at a time gives the same search whether or not it was stopped.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rcpo.common.console import number
from rcpo.common.errors import UserError
from rcpo.config.conditions import keys_of
from rcpo.sweep.checks import check_inputs
from rcpo.sweep.definition import AxisValue, Definition, definition_of, read_tree
from rcpo.sweep.expand import Point, digest_of_axes, name_of
from rcpo.sweep.folder import Cell, SweepFolder
from rcpo.sweep.freeze import FrozenCell, description, freeze_cell
from rcpo.sweep.grow import add_cell, begin, with_free_name
from rcpo.sweep.local import run_cells
from rcpo.sweep.space import EVAL, Range, Search
from rcpo.sweep.states import CellStatus, State
from rcpo.sweep.target import Here

OF = "of"
"""What the study remembers: the sweep file that it was made for."""
WHY = "why"
"""What a failed trial remembers."""
SEEDS_APART = 100_003
"""Between the seeds of two searches, so that their trials share none."""


def searched(definition: Definition) -> Search:
    """What the file says of its search. Raises UserError where it cannot be one."""
    if definition.search is None:
        raise UserError(
            "--search optuna: the file does not say what is best; write the line search: {metric: "
            "eval/displacement/margin, direction: maximize, trials: 20}"
        )
    if definition.exclude or definition.include:
        raise UserError(
            "--search optuna: exclude and include are of grids; remove them, or leave --search out"
        )
    return definition.search


def look(definition: Definition, sweep: SweepFolder, fetch: bool) -> list[str]:
    """Compose every choice and both ends of every range, with the first value of all other axes, and read the
    inputs; nothing is written. Returns the search in a few lines. Raises UserError."""
    search, cells = searched(definition), list[FrozenCell]()
    first = {axis: values[0] for axis, values in _ends(definition).items()}
    for axis, values in _ends(definition).items():
        for value in values if axis == next(iter(first)) else values[1:]:
            cells.append(freeze_cell(_point(definition, first | {axis: value}), definition, sweep, Here()))
    for cell in cells:
        _check_metric(search, cell)
    check_inputs(cells, fetch=fetch)
    lines = [f"{search.trials} trials {search.direction} {search.metric}, seed {search.seed}, over"]
    for axis, values in definition.axes.items():
        lines.append(f"  {axis}: {', '.join(value.label for value in values)}")
    for axis, span in definition.ranges.items():
        how = " in the logarithm" if span.log else "" if span.step is None else f" in steps of {span.step:g}"
        lines.append(f"  {axis}: {span.low:g} to {span.high:g}{how}, {span.type}")
    return lines


def _check_metric(search: Search, frozen: FrozenCell) -> None:
    """Raise UserError where the evaluations of a cell will not have the metric."""
    reads_tokens = frozen.config.objective_function.reads_tokens
    known = [f"{EVAL}{key}" for key in keys_of(frozen.config, reads_tokens)]
    if search.metric not in known:
        raise UserError(
            f"search.metric: {search.metric}: no such key in the evaluations of {frozen.cell.name}; choose "
            f"one of {', '.join(known)}"
        )


def run_search(definition: Definition, sweep: SweepFolder, num_parallel: int) -> int:
    """Run the trials that are missing; returns the exit code: 0 when one of them at least is done, 130 or 75
    after Ctrl-C or SIGTERM, else 1. Call with the sweep held."""
    trials = _Trials(definition, sweep)
    print(trials.line(), flush=True)
    return run_cells(sweep, trials, num_parallel)


def definition_in(sweep: SweepFolder) -> Definition:
    """What a search's folder was made from, for `rcpo resume`."""
    tree = read_tree(sweep.sweep_yaml)
    tree.pop("frozen_with", None)
    return definition_of(tree, sweep.path.name, [])


class _Trials:
    """The trials of one study, as the cells that a runner asks for (`rcpo.sweep.local.Waiting`)."""

    def __init__(self, definition: Definition, sweep: SweepFolder) -> None:
        self._definition, self._sweep, self._search = definition, sweep, searched(definition)
        self._optuna = _optuna()
        begin(sweep, definition)
        self._study = self._opened()
        self._running: dict[str, list[int]] = {}
        """Trials by the name of the cell that runs for them."""
        self._numbers = self._missing()
        self.num = self._search.trials - len(self._finished())

    def line(self) -> str:
        """What there is to do."""
        text = f"{self._search.trials} trials in {self._sweep.path}"
        return text if self.num == self._search.trials else f"{text}, {max(0, self.num)} of them to do"

    def _opened(self) -> Any:
        """The study, of this file and no other."""
        journal = self._optuna.storages.journal
        study = self._optuna.create_study(
            storage=self._optuna.storages.JournalStorage(journal.JournalFileBackend(str(self._sweep.study))),
            study_name=self._definition.name, direction=self._search.direction, load_if_exists=True,
        )  # fmt: skip
        tree = description(self._definition)
        tree["search"] = {key: value for key, value in tree["search"].items() if key != "trials"}
        now, known = json.dumps(tree, sort_keys=True), study.user_attrs.get(OF)
        if known is None:
            study.set_user_attr(OF, now)
        elif known != now:
            before = json.loads(known)
            changed = ", ".join(key for key in tree if tree[key] != before.get(key))
            raise UserError(
                f"{self._sweep.path}: is a search of another file ({changed} changed, and only search.trials "
                "may); type --out FOLDER for a new one"
            )
        return study

    def _finished(self) -> list[Any]:
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()]

    def _missing(self) -> Iterator[Any]:
        """Trials that were stopped, then new ones, as optuna's objects that values are asked of."""
        for trial in self._study.get_trials(deepcopy=False):
            if not trial.state.is_finished():
                yield self._seeded(trial.number, lambda known=trial: self._again(known))
        while len(trials := self._study.get_trials(deepcopy=False)) < self._search.trials:
            yield self._seeded(len(trials), self._study.ask)

    def _seeded(self, trial_number: int, make: Any) -> Any:
        seed = self._search.seed * SEEDS_APART + trial_number
        self._study.sampler = self._optuna.samplers.TPESampler(seed=seed % 2**32)
        return make()

    def _again(self, trial: Any) -> Any:
        return self._optuna.trial.Trial(self._study, trial._trial_id)

    def next(self) -> Cell | None:
        """The cell of the next trial; None when there is none left."""
        for trial in self._numbers:
            values = _values(self._definition, trial)
            twin = self._twin_of(trial)
            if twin is not None and twin.state.is_finished():
                self._tell(trial.number, twin.value, twin.user_attrs.get(WHY))
                continue
            try:
                cell = self._cell_of(values)
            except UserError as error:
                self._tell(trial.number, None, str(error))
                continue
            self._running.setdefault(cell.name, []).append(trial.number)
            if len(self._running[cell.name]) == 1:
                return cell
        return None

    def _twin_of(self, trial: Any) -> Any:
        """A trial of the same values that is done: the same cell would come of it."""
        return next(
            (one for one in self._finished() if one.params == trial.params and one.number != trial.number),
            None,
        )

    def _cell_of(self, values: Mapping[str, AxisValue]) -> Cell:
        """The frozen cell of these values, made where it is not there yet."""
        point, cells = _point(self._definition, values), self._sweep.read_cells()
        for cell in cells:
            if digest_of_axes(cell.axes) == digest_of_axes(point.axes):
                return cell
        point = with_free_name(point, {cell.name.casefold() for cell in cells})
        frozen = freeze_cell(point, self._definition, self._sweep, Here())
        check_inputs([frozen], fetch=True)
        add_cell(self._sweep, frozen)
        return frozen.cell

    def ended(self, status: CellStatus) -> None:
        """Tell optuna what became of a cell; of one that was stopped nothing: its trial goes on."""
        if status.state not in (State.DONE, State.FAILED):
            return
        value, why = None, status.reason
        if status.state is State.DONE:
            rows = self._sweep.run(status.cell).rows(self._sweep.run(status.cell).eval)
            last = rows[-1] if rows else {}
            value, why = last.get(self._search.metric.removeprefix(EVAL), math.nan), None
            if not math.isfinite(value):
                value, why = None, f"{self._search.metric} is {value}"
        for trial_number in self._running.pop(status.cell.name, []):
            self._tell(trial_number, value, why)

    def _tell(self, trial_number: int, value: float | None, why: str | None) -> None:
        states = self._optuna.trial.TrialState
        trial = self._study.get_trials(deepcopy=False)[trial_number]
        if value is None:
            self._again(trial).set_user_attr(WHY, why or "failed")
            self._study.tell(trial_number, state=states.FAIL)
        else:
            self._study.tell(trial_number, value)

    def last_words(self, statuses: Sequence[CellStatus]) -> tuple[list[str], bool]:
        """How many trials there are of each outcome, why some failed, and the best with its command."""
        finished = self._finished()
        done = [trial for trial in finished if trial.value is not None]
        failed = [trial for trial in finished if trial.value is None]
        left = self._search.trials - len(finished)
        lines = [f"trial {trial.number}: failed: {trial.user_attrs.get(WHY)}" for trial in failed]
        counts = {"done": len(done), "failed": len(failed), "to do": max(0, left)}
        shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        lines.append(f"{len(finished) + max(0, left)} trials: {shown}")
        if left > 0:
            lines.append(f"`rcpo resume {self._sweep.path}` goes on with the search")
        if done:
            lines += self._best(max(done, key=lambda trial: trial.value * self._sign()))
        return lines, bool(done)

    def _sign(self) -> int:
        return 1 if self._search.direction == "maximize" else -1

    def _best(self, trial: Any) -> list[str]:
        point = _point(self._definition, _values(self._definition, trial))
        cells = {digest_of_axes(cell.axes): cell for cell in self._sweep.read_cells()}
        cell = cells[digest_of_axes(point.axes)]
        return [
            f"best: {self._search.metric} {number(trial.value)} in trial {trial.number}, "
            f"{self._sweep.run(cell).path}",
            shlex.join(["rcpo", "train", *cell.words, f"name={cell.name}"]),
        ]


def _values(definition: Definition, trial: Any) -> dict[str, AxisValue]:
    """What a trial of optuna's has on every axis: proposed now, or before."""
    values = {}
    for axis, choices in definition.axes.items():
        label = _asked(trial, "categorical", axis, [choice.label for choice in choices])
        values[axis] = next(choice for choice in choices if choice.label == label)
    for axis, span in definition.ranges.items():
        settings: dict[str, Any] = {"log": span.log}
        if span.step is not None:
            settings["step"] = int(span.step) if span.type == "int" else span.step
        low, high = _typed(span, span.low), _typed(span, span.high)
        values[axis] = _value(axis, _asked(trial, span.type, axis, low, high, **settings))
    return values


def _asked(trial: Any, kind: str, axis: str, *among: Any, **settings: Any) -> Any:
    """What the trial has on the axis already, else what optuna proposes."""
    known = trial.params.get(axis)
    return known if known is not None else getattr(trial, f"suggest_{kind}")(axis, *among, **settings)


def _typed(span: Range, value: float) -> float:
    return int(value) if span.type == "int" else float(value)


def _value(axis: str, value: float) -> AxisValue:
    return AxisValue(repr(value), (f"{axis}={value!r}",))


def _ends(definition: Definition) -> dict[str, list[AxisValue]]:
    """All choices, and the two ends of each range."""
    return definition.axes | {
        axis: [_value(axis, _typed(span, end)) for end in (span.low, span.high)]
        for axis, span in definition.ranges.items()
    }


def _point(definition: Definition, values: Mapping[str, AxisValue]) -> Point:
    """The cell of these values; in its name numbers have three digits."""
    axes = {axis: value.label for axis, value in values.items()}
    short = {
        axis: f"{float(label):.3g}" if axis in definition.ranges else label for axis, label in axes.items()
    }
    words = [word for value in values.values() for word in value.words]
    return Point(name_of(definition, short), axes, [*definition.overrides, *words])


def _optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        raise UserError(
            "--search optuna: needs the optuna package; type pip install 'rcpo[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
