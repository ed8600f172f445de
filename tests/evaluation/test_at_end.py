"""train.evaluate: which option its words select, and an evaluation at the end that fails."""

import dataclasses
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rcpo.commands.evaluate import OPTIONS
from rcpo.common.conf import conf_dir
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.evaluation import OWN
from rcpo.config.resolve import resolve
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.validate import validate
from rcpo.evaluation import tasks
from rcpo.evaluation.options import option_named
from rcpo.evaluation.results import INITIAL, Score, TaskResult
from rcpo.evaluation.subject import find_subject
from rcpo.launch.at_end import check_tasks, scores_at_end
from rcpo.launch.first_look import look
from rcpo.runs.folder import RunFolder

SHIPPED = sorted(path.stem for path in (conf_dir() / "evaluation").glob("*.yaml"))


def config_of(*words: str) -> ResolvedConfig:
    tree = compose(["train.device=cpu", *words])
    assert tree is not None
    return resolve(validate(tree), None)


@pytest.mark.parametrize("word", ["train.evaluate=paper_v2", "evaluation=paper_v2"])
def test_either_word_means_both(word: str) -> None:
    config = config_of(word, "evaluation.limit=3")
    assert (config.train.evaluate, config.evaluation.name) == ("paper_v2", "paper_v2")
    assert (config.evaluation.tasks[0], config.evaluation.limit) == ("leaderboard_bbh", 3)


def test_an_option_of_ones_own_is_selected_by_its_name_and_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "evaluation/mine.yaml"
    file.parent.mkdir()
    file.write_text("defaults: [word_problems, _self_]\nname: mine\ntasks: [sums]\ntasks_dir: my-tasks\n")
    own = config_of("train.evaluate=mine", "--config-dir", str(tmp_path)).evaluation
    assert own == option_named(str(file))
    assert (own.tasks, own.tasks_dir, own.batch) == (["sums"], "my-tasks", 32)
    file.write_text("defaults: [word_problems, _self_]\ntasks: [sums]\n")
    with pytest.raises(
        UserError, match=r"is named word_problems; .* write name: mine into a file of your own"
    ):
        config_of("train.evaluate=mine", "--config-dir", str(tmp_path))


@pytest.mark.parametrize("named", ["paper_v9", "[{a: b}]", "5", "[word_problems, mine]"])
def test_defaults_that_there_are_not_are_refused(tmp_path: Path, named: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"defaults: {named}\ntasks: [sums]\n")
    with pytest.raises(
        UserError, match=r"defaults: .*: no such option; choose of paper_v1, paper_v2, safety"
    ):
        option_named(str(file))


def test_the_help_names_the_options_that_ship() -> None:
    assert set(OPTIONS) == set(SHIPPED)


def fails(error: BaseException) -> Any:
    def of(*_: Any) -> Any:
        raise error

    return of


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_an_evaluation_that_fails_is_one_warning_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    monkeypatch.setattr("rcpo.evaluation.subject.find_subject", fails(error))
    config = config_of(
        "train.evaluate=word_problems", f"run_dir={tmp_path}", "evaluation.limit=7", "evaluation.chat=true"
    )
    ask = scores_at_end(config, RunFolder(tmp_path))
    assert ask is not None
    assert ask() == {}
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    again = f"rcpo evaluate {RunFolder(tmp_path).shown(tmp_path)} tasks=arithmetic limit=7 chat=yes"
    assert line.endswith(f"the run is done: type {again}")
    assert (str(error) or type(error).__name__) in line


def test_a_signal_ends_the_evaluation_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stopped(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("rcpo.evaluation.subject.find_subject", stopped)
    ask = scores_at_end(config_of("train.evaluate=word_problems"), RunFolder(tmp_path))
    assert ask is not None
    assert ask() == {}
    assert "stopped by SIGTERM" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_train_evaluate_nothing_is_asked(tmp_path: Path) -> None:
    assert scores_at_end(config_of(), RunFolder(tmp_path)) is None


def test_an_initial_model_is_asked_once_for_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process asks is a new `Evaluation`; what the first found is in RCPO_CACHE. Damaged, of
    another rcpo, or with --again, it is asked once more."""
    asked = []

    def answers(*_: Any) -> Any:
        asked.append(1)
        return {"exact_match": Score(0.5, 0.1)}, [{"id": "a", "value": 0.5}]

    monkeypatch.setattr(tasks.Evaluation, "_ask", answers)
    (subject,) = [dataclasses.replace(find_subject("builtin:tiny"), when=INITIAL)]

    def found(again: bool = False) -> TaskResult:
        return tasks.Evaluation(option_named("word_problems")).of(subject, again, print)["arithmetic"]

    assert found() == found()
    assert len(asked) == 1
    assert found(again=True).metrics == {"exact_match": Score(0.5, 0.1)}
    assert len(asked) == 2
    for file in Path(os.environ["RCPO_CACHE"]).glob("evaluation/*.json"):
        file.write_text("{")
    found()
    monkeypatch.setattr(tasks, "code_hash", lambda: "another")
    found()
    assert len(asked) == 4


@pytest.mark.ci("lm-eval", needs="lm_eval")
def test_lm_eval_has_every_task_that_ships() -> None:
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().task_index)
    assert {task for name in SHIPPED for task in option_named(name).tasks if task not in OWN} - known == set()


def test_tasks_are_looked_at_before_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "Harness", fails(UserError("tasks=arc_easy: cannot be loaded")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"^train.evaluate=paper_v1: tasks=arc_easy: cannot be loaded"):
        check_tasks(config_of("train.evaluate=paper_v1"))


def test_lm_eval_that_is_not_here_is_said_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tree = compose(["train.evaluate=safety"])
    assert tree is not None
    with pytest.raises(UserError, match=r"^train.evaluate=safety: needs lm-eval; type pip install"):
        look(tree, overwrite=False)
