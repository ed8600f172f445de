"""`rcpo evaluate RUN|SWEEP|MODEL... tasks=NAME,NAME`: scores of models on tasks, into the runs' folders."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rcpo.commands.flags import Flags
from rcpo.commands.settings import Setting, add_settings, names, split_words, whole_number, yes_or_no
from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.evaluation.results import TaskResult
    from rcpo.evaluation.subject import Subject

OPTIONS = ("word_problems", "paper_v1", "paper_v2", "safety")
SETTINGS = (
    Setting(
        "evaluation",
        "word_problems (default), paper_v1, paper_v2, safety, or a file like theirs",
        offered=OPTIONS,
        default="word_problems",
    ),
    Setting("tasks", "names in place of its tasks: arithmetic, lm-eval's, or those of tasks_dir", names),
    Setting("tasks_dir", "a folder of lm-eval's task files (YAML) of your own"),
    Setting("step", "the runs' checkpoints of that step, in place of their ends"),
    Setting(
        "initial", "yes (default): the models that runs started from, too", yes_or_no, True, ("yes", "no")
    ),
    Setting("batch", "prompts at once (default: 32)", whole_number(1)),
    Setting("limit", "only so many of the first questions of lm-eval's tasks", whole_number(1)),
    Setting("chat", "yes: lm-eval's questions as user turns (default: no)", yes_or_no, None, ("yes", "no")),
)


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Score models on tasks. Of runs, the scores and their standard errors go into RUN/evaluation.json,
every question into RUN/evaluation/, and `rcpo compare` shows them, with differences to calibration=off
that are paired by question. arithmetic is the held-out word problems of the model that ships: exact
match of generated answers, without network. Other tasks run through lm-eval (pip install
'rcpo[evaluate]'). What is known already is not evaluated again."""
    parser.epilog = """\
examples:
  rcpo evaluate RUN
  rcpo evaluate SWEEP evaluation=paper_v1
  rcpo evaluate RUN MODEL tasks=mine tasks_dir=TASKS"""
    add_settings(parser, SETTINGS, "RUN|SWEEP|MODEL")
    parser.add_argument("--again", action="store_true", help="evaluate what is known already, too")


def run(options: argparse.Namespace) -> int:
    """Evaluate; returns the exit code. Raises UserError for bad input, before weights are loaded."""
    places, settings = split_words(options.words, SETTINGS)
    if not places:
        raise UserError("nothing to evaluate; give run folders, a sweep or models; `rcpo evaluate --help`")
    from rcpo.common.console import RunConsole
    from rcpo.evaluation.options import option_named, with_settings

    asked = {key: getattr(settings, key) for key in ("tasks", "tasks_dir", "batch", "limit", "chat")}
    option = with_settings(option_named(settings.evaluation), asked)
    from rcpo.evaluation.tasks import Evaluation, with_initial

    subjects = _subjects(places, settings.step)
    evaluation = Evaluation(option)
    console = RunConsole()
    found = []
    for subject in with_initial(subjects) if settings.initial else subjects:
        try:
            results = evaluation.of(subject, options.again, lambda line: console.print(line, soft_wrap=True))
        except OSError as error:
            raise UserError(
                f"{subject.name}: results cannot be written ({error.strerror}); make room and type the same "
                "again: finished tasks are kept"
            ) from None
        found.append((subject, results))
    _print(console, option.tasks, found)
    return 0


def _subjects(places: list[str], step: str | None) -> "list[Subject]":
    """Runs of folders, sweeps and patterns, and models. Runs without a model yet are an error."""
    from rcpo.comparison.find import find_runs, is_run
    from rcpo.evaluation.subject import find_subject, is_adapter

    words = []
    for place in places:
        path = Path(place)
        is_model = (path / "config.json").is_file() or is_adapter(path)
        if is_run(path) or not (path.is_dir() or any(sign in place for sign in "*?[")) or is_model:
            words.append(place)
        else:
            words += [str(run) for run in find_runs([place])]
    return [find_subject(word, step) for word in words]


def _print(console: object, tasks: list[str], found: "list[tuple[Subject, dict[str, TaskResult]]]") -> None:
    """A line a model; the same initial model once."""
    from rich.console import Console
    from rich.table import Table

    from rcpo.evaluation.results import INITIAL

    table = Table("model", "which", *tasks, box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    seen: set[str] = set()
    for subject, results in found:
        is_initial = subject.when == INITIAL
        name = "initial model" if is_initial else subject.name
        line = [name, "" if is_initial else subject.when, *(_text(results[task]) for task in tasks)]
        if is_initial and subject.fingerprint not in seen:
            seen.add(subject.fingerprint)
        elif is_initial:
            continue
        table.add_row(*line)
    assert isinstance(console, Console)
    console.print(table)


def _text(result: "TaskResult") -> str:
    name, score = result.main
    error = "" if score.stderr is None else f" ± {score.stderr:.3f}"
    return f"{name} {score.value:.3f}{error}"
