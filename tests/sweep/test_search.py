"""Searches through optuna: trials as cells, kept in the folder, gone on with after a stop.

Cells are stand-ins whose evaluation is a formula of their learning rate; nothing is composed or trained here.
"""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from helpers.stand_in_cells import StandIn
from rcpo.common.errors import UserError
from rcpo.sweep import local, search
from rcpo.sweep.definition import Definition, definition_of
from rcpo.sweep.folder import Cell, SweepFolder
from rcpo.sweep.freeze import FrozenCell
from rcpo.sweep.states import State

FILE = {
    "overrides": ["tracking=none"],
    "axes": {
        "objective": ["dpo", "simpo"],
        "optim.lr": {"type": "float", "low": "1e-6", "high": "1e-3", "log": "true"},
    },
    "search": {"metric": "eval/displacement/margin", "direction": "maximize", "trials": "12"},
}


def definition(**changes: Any) -> Definition:
    return definition_of(FILE | changes, "lrs", [])


class Scored(StandIn):
    """A cell that is done at once: its margin is highest at lr 1e-4 with simpo; dpo fails above 3e-4."""

    started: list[str]

    def poll(self) -> int:
        Scored.started.append(self.cell.name)
        lr, objective = float(self.cell.axes["optim.lr"]), self.cell.axes["objective"]
        if objective == "dpo" and lr > 3e-4:
            self.run.update_run(status="failed", exit_reason="not finite")
            return 3
        margin = -abs(math.log10(lr) + 4) + (objective == "simpo")
        self.run.eval.write_text(json.dumps({"step": 3, "displacement/margin": margin}) + "\n")
        self.run.update_run(status="done")
        return 0


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    def frozen(point: Any, of: Any, folder: SweepFolder, target: Any) -> FrozenCell:
        return FrozenCell(Cell(point.name, point.axes, point.words, "digest"), None, None)  # type: ignore[arg-type]

    def write(folder: SweepFolder, cells: list[FrozenCell]) -> None:
        for item in cells:
            run = folder.run(item.cell)
            run.path.mkdir(parents=True)
            run.config.write_text("{}")
            run.update_run(status="pending")

    monkeypatch.setattr(search, "freeze_cell", frozen)
    monkeypatch.setattr(search, "check_inputs", lambda cells, fetch: {})
    monkeypatch.setattr("rcpo.sweep.freeze.write_cells", write)
    monkeypatch.setattr(local, "_Child", Scored)
    monkeypatch.setattr(local, "SECONDS_BETWEEN_LOOKS", 0.0)
    Scored.started = []
    folder = SweepFolder(tmp_path / "lrs")
    folder.path.mkdir()
    return folder


def axes_of(sweep: SweepFolder) -> list[dict[str, Any]]:
    return [cell.axes for cell in sweep.read_cells()]


def test_a_search_finds_the_best_and_says_how_to_make_it_again(
    sweep: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failed trials are counted and named; the last lines are the best trial and its command."""
    assert search.run_search(definition(), sweep, 1) == 0
    said = capsys.readouterr().out.splitlines()
    states = [sweep.run(cell).read_run()["status"] for cell in sweep.read_cells()]
    assert states.count("failed") >= 1, "else this test tests less"
    assert f"12 trials: {12 - states.count('failed')} done, {states.count('failed')} failed" in said
    assert any(line.endswith("failed: not finite") for line in said)
    margins = {
        cell.name: json.loads(sweep.run(cell).eval.read_text())["displacement/margin"]
        for cell in sweep.read_cells()
        if sweep.run(cell).eval.is_file()
    }
    best = max(margins, key=margins.__getitem__)
    (cell,) = [cell for cell in sweep.read_cells() if cell.name == best]
    (line,) = [line for line in said if line.startswith("best: eval/displacement/margin ")]
    assert str(sweep.run(cell).path) in line
    lr = cell.axes["optim.lr"]
    command = f"rcpo train tracking=none objective=simpo optim.lr={lr} name={best}"
    assert command in said


def test_a_search_that_was_stopped_is_the_one_that_never_was(
    sweep: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its fifth trial, before optuna heard of it; the trial goes on in its cell, no other runs
    twice, and all values are those of an undisturbed search. Afterwards there is nothing to do."""
    whole = SweepFolder(tmp_path / "whole")
    whole.path.mkdir()
    assert search.run_search(definition(), whole, 1) == 0
    Scored.started = []
    poll = Scored.poll

    def killed(child: Scored) -> int:
        if len(Scored.started) == 4:
            raise MemoryError
        return poll(child)

    monkeypatch.setattr(Scored, "poll", killed)
    with pytest.raises(MemoryError):
        search.run_search(definition(), sweep, 1)
    assert len(sweep.read_cells()) == 5
    monkeypatch.setattr(Scored, "poll", poll)
    assert search.run_search(search.definition_in(sweep), sweep, 1) == 0
    assert axes_of(sweep) == axes_of(whole)
    assert len(Scored.started) == len(set(Scored.started)) == 12
    assert search.run_search(definition(), sweep, 1) == 0
    assert len(Scored.started) == 12


def test_more_trials_go_on_and_another_space_is_refused(sweep: SweepFolder) -> None:
    few = FILE["search"] | {"trials": "2"}  # type: ignore[operator]
    assert search.run_search(definition(search=few), sweep, 1) == 0
    assert search.run_search(definition(search=few | {"trials": "3"}), sweep, 1) == 0
    assert len(sweep.read_cells()) == 3
    with pytest.raises(UserError, match=r"is a search of another file \(overrides changed, and only"):
        search.run_search(definition(overrides=["seed=1"]), sweep, 1)


def test_the_same_values_again_are_the_same_cell(sweep: SweepFolder) -> None:
    """Twelve trials of two choices: two cells, each run once; minimised, with several at a time."""
    axes = {"objective": ["dpo", "simpo"], "optim.lr": ["1e-4"]}
    down = FILE["search"] | {"direction": "minimize"}  # type: ignore[operator]
    trials = search._Trials(definition(axes=axes, search=down), sweep)
    assert local.run_cells(sweep, trials, 3) == 0
    assert sorted(Scored.started) == ["dpo-lr1e-4", "simpo-lr1e-4"]
    lines, _ = trials.last_words([])
    assert "12 trials: 12 done" in lines
    assert "objective=dpo" in lines[-1]


def test_a_metric_that_no_evaluation_has_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """By what evaluations of these cells will have: probed/* where calibration steers by held-out pairs."""
    cases = {"displacement/margn": False, "probed/chosen": False, "displacement/chosen": True}
    for metric, is_fine in cases.items():
        asked = FILE["search"] | {"metric": f"eval/{metric}"}  # type: ignore[operator]
        refused = pytest.raises(UserError, match=rf"{metric}: no such key in .*; choose one of")
        with nullcontext() if is_fine else refused:
            search.look(definition(search=asked), SweepFolder(tmp_path / "lrs"), fetch=False)
    assert list(tmp_path.iterdir()) == []


def test_a_metric_without_a_number_is_a_failed_trial(
    sweep: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    other = FILE["search"] | {"metric": "eval/displacement/noise_floor", "trials": "2"}  # type: ignore[operator]
    assert search.run_search(definition(search=other), sweep, 1) == 1
    assert "trial 0: failed: eval/displacement/noise_floor is nan" in capsys.readouterr().out


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"axes": {"a.b": {"low": "1", "high": "2"}}}, "axes.a.b.type: None: must be float or int"),
    "low": (
        {"axes": {"a": {"type": "int", "low": "x", "high": "2"}}},
        "axes.a.low: x: must be a whole number",
    ),
    "order": ({"axes": {"a": {"type": "int", "low": "3", "high": "2"}}}, "axes.a.low: 3: must be less than"),
    "log": (
        {"axes": {"a": {"type": "float", "low": "0", "high": "2", "log": "true"}}},
        "axes.a.log: must have low above 0 and no step",
    ),
    "high": ({"axes": {"a": {"type": "int", "low": "1"}}}, "axes.a.high: has no value and needs one"),
    "key": ({"axes": {"a": {"type": "int", "min": "1"}}}, "axes.a.min: no such key; a range is"),
    "metric": ({"search": {"metric": "loss", "direction": "maximize"}}, "search.metric: loss: must be eval/"),
    "direction": ({"search": {"metric": "eval/a", "direction": "up"}}, "search.direction: up: must be max"),
    "trials": (
        {"search": {"metric": "eval/a", "direction": "maximize", "trials": "0"}},
        "search: trials must be at least 1",
    ),
    "search": ({"search": ["a"]}, "search: must hold keys and values"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_space_is_one_line(name: str) -> None:
    changes, line = FAULTS[name]
    with pytest.raises(UserError) as caught:
        definition(**changes)
    assert str(caught.value).startswith(line)


def test_a_range_is_of_a_search_alone_and_a_search_needs_a_metric() -> None:
    from rcpo.sweep.expand import expand

    with pytest.raises(UserError, match=r"axes.optim.lr: is a range, for a search; type --search optuna"):
        expand(definition())
    with pytest.raises(UserError, match=r"the file does not say what is best; write the line search: "):
        search.searched(definition(search=None))


def test_a_stopped_cell_leaves_its_trial_open(sweep: SweepFolder) -> None:
    trials = search._Trials(definition(), sweep)
    cell = trials.next()
    assert cell is not None
    sweep.run(cell).update_run(status="preempted")
    trials.ended(local.read_status(sweep, cell, None))
    assert local.read_status(sweep, cell, None).state is State.PREEMPTED
    again = search._Trials(definition(), sweep)
    assert again.next() == cell
