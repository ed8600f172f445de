"""`rcpo evaluate RUN|SWEEP|MODEL... tasks=NAME,NAME`: scores of models on tasks, into the runs' folders."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rcpo.commands.flags import Flags, add_array_flags, positive_int
from rcpo.commands.settings import ENGINE, Setting, add_settings, names, split_words, whole_number, yes_or_no
from rcpo.common.errors import UserError
from rcpo.evaluation.engines import ANSWERS_AT_ONCE, TRANSFORMERS, refuse_missing_engine

if TYPE_CHECKING:
    from rich.console import Console

    from rcpo.config.evaluation import EvaluationConfig
    from rcpo.evaluation.results import TaskResult
    from rcpo.evaluation.subject import Subject

OPTIONS = ("word_problems", "paper_v1", "paper_v2", "safety", "yes_no")
SETTINGS = (
    Setting(
        "evaluation",
        "word_problems (default), paper_v1, paper_v2, safety, yes_no, or a file like theirs",
        offered=OPTIONS,
        default="word_problems",
    ),
    Setting(
        "tasks", "names in place of its tasks: arithmetic, yes_no, lm-eval's, or those of tasks_dir", names
    ),
    Setting("tasks_dir", "a folder of lm-eval's task files (YAML) of your own"),
    Setting("questions", "of yes_no: a file, a folder or a hub id, in the form of POPE's rows"),
    Setting("questions_images", "the folder of their images (default: that of the file)"),
    Setting("questions_split", "which split of such a data set, where it has several"),
    Setting("questions_config", "which config of such a data set, where it has several"),
    Setting("questions_revision", "which branch, tag or commit of a hub id (default: main)"),
    Setting("step", "the runs' checkpoints of that step, in place of their ends"),
    Setting(
        "initial", "yes (default): the models that runs started from, too", yes_or_no, True, ("yes", "no")
    ),
    Setting("batch", "prompts at once (default: 32; given to vllm: 256)", whole_number(1)),
    Setting("limit", "only so many of the first questions of yes_no and lm-eval's tasks", whole_number(1)),
    Setting("chat_template", "plain, or a jinja file; by default the model's own"),
    ENGINE,
    Setting("chat", "yes: lm-eval's questions as user turns (default: no)", yes_or_no, None, ("yes", "no")),
)

OF_OPTION = (
    "tasks", "tasks_dir", "batch", "limit", "chat",
    *(setting.name for setting in SETTINGS if setting.name.startswith("questions")),
)  # fmt: skip
"""Those that stand for keys of an option of the group evaluation."""


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Score models on tasks. Of runs, the scores and their standard errors go into RUN/evaluation.json,
every question into RUN/evaluation/, and `rcpo compare` shows them, with differences to calibration=off
that are paired by question. arithmetic is the held-out word problems of the model that ships: exact
match of generated answers, without network. yes_no asks your questions that yes or no answers, about
images too, in the form of POPE: accuracy, precision, recall, F1 and the rate of yes, by log-probability
and by what is written. Other tasks run through lm-eval (pip install
'rcpo[evaluate]'). What is known already is not evaluated again. Of several runs, each GPU of this
machine evaluates one at a time."""
    parser.epilog = """\
examples:
  rcpo evaluate RUN
  rcpo evaluate SWEEP evaluation=paper_v1
  rcpo evaluate SWEEP evaluation=paper_v1 --slurm my_cluster.yaml
  rcpo evaluate RUN tasks=yes_no questions=POPE.jsonl
  rcpo evaluate RUN MODEL tasks=mine tasks_dir=TASKS"""
    add_settings(parser, SETTINGS, "RUN|SWEEP|MODEL")
    add = parser.add_argument
    add("--again", action="store_true", help="evaluate what is known already, too")
    add(
        "--parallel",
        type=positive_int,
        metavar="N",
        help="of several runs N at a time here; default: the number of GPUs, or 1",
    )
    add(
        "--slurm",
        metavar="PROFILE",
        help="submit a sweep's cells to SLURM, each to start when it is trained: a file in conf/cluster/, "
        "or a path",
    )
    add_array_flags(parser)
    parser.check = check


def check(options: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    if options.slurm is None and (options.print or options.max_parallel is not None):
        raise UserError("--print and --max-parallel: are for SLURM; type --slurm PROFILE as well")
    if options.slurm is None:
        return
    if options.parallel is not None:
        raise UserError("--parallel: is for this machine; type --max-parallel with --slurm")
    if options.again:
        raise UserError(
            "--again: each of SLURM's tasks would ask the initial model again; leave it out, or leave out "
            "--slurm"
        )


def run(options: argparse.Namespace) -> int:
    """Evaluate; returns the exit code. Raises UserError for bad input, before weights are loaded."""
    places, settings = split_words(options.words, SETTINGS)
    if not places:
        raise UserError("nothing to evaluate; give run folders, a sweep or models; `rcpo evaluate --help`")
    from rcpo.common.console import RunConsole
    from rcpo.evaluation.options import option_named, with_settings

    refuse_missing_engine(settings.engine)
    asked = {key: getattr(settings, key) for key in OF_OPTION}
    if settings.engine != TRANSFORMERS:
        asked["batch"] = settings.batch or ANSWERS_AT_ONCE[settings.engine]
    option = with_settings(option_named(settings.evaluation), asked)
    if options.slurm is not None:
        return _submit(places, options, option)
    words = _runs_and_models(places)
    from rcpo.evaluation.subject import find_subject
    from rcpo.evaluation.tasks import Evaluation, with_initial

    subjects = [find_subject(word, settings.step, settings.chat_template, settings.engine) for word in words]
    evaluation = Evaluation(option)
    console = RunConsole()
    asked_now = [each for each in subjects if options.again or not evaluation.knows(each)]
    done, failed = _side_by_side(places, asked_now, options, console)
    subjects = [each for each in subjects if each.run is None or each.run.path not in failed]
    found = []
    for subject in with_initial(subjects) if settings.initial else subjects:
        again = options.again and subject not in done
        try:
            before = evaluation.before(subject)
            results = evaluation.of(subject, again, lambda line: console.print(line, soft_wrap=True))
        except OSError as error:
            raise UserError(
                f"{subject.name}: results cannot be written ({error.strerror}); make room and type the same "
                "again: finished tasks are kept"
            ) from None
        found.append((subject, results))
        _send(subject, {task: each for task, each in results.items() if each != before.get(task)})
    _print(console, option.tasks, found)
    return 1 if failed else 0


def _send(subject: "Subject", new: "dict[str, TaskResult]") -> None:
    """What was found now of a trained model to the tracker of its run."""
    from rcpo.evaluation.results import FINAL

    if subject.run is None or subject.config is None or subject.when != FINAL or not new:
        return
    from rcpo.monitor.sinks import send_scores
    from rcpo.runs.rows import read_last_rows

    rows = read_last_rows(subject.run.metrics)
    step = int(rows[-1]["step"]) if rows else 0
    values = {task: result.main[1].value for task, result in new.items()}
    send_scores(subject.config, subject.run, step, values)


def _side_by_side(
    places: list[str], subjects: "list[Subject]", options: argparse.Namespace, console: "Console"
) -> "tuple[list[Subject], dict[Path, str]]":
    """(runs that processes of their own have evaluated, why others failed): where several runs can be
    evaluated at the same time. What the runs started from is left to this process, once for all."""
    from rcpo.evaluation.processes import evaluate_runs, num_processes
    from rcpo.evaluation.results import INITIAL

    trained = [each for each in subjects if each.run is not None and each.when != INITIAL]
    num_at_once = num_processes(len(trained), options.parallel)
    if num_at_once < 2:
        return [], {}
    settings = [word for word in options.words if word not in places and not word.startswith("initial=")]
    words = [*settings, "initial=no", *(["--again"] if options.again else [])]
    runs = [each.run for each in trained if each.run is not None]
    failed = evaluate_runs(runs, words, num_at_once, lambda line: console.print(line, soft_wrap=True))
    return [each for each in trained if each.run is not None and each.run.path not in failed], failed


def _submit(places: list[str], options: argparse.Namespace, option: "EvaluationConfig") -> int:
    """To SLURM; returns the exit code. Tasks are loaded here first, where there is a network."""
    from rcpo.sweep.folder import SweepFolder, is_sweep
    from rcpo.sweep.slurm import evaluation as slurm

    if len(places) != 1 or not is_sweep(places[0]):
        raise UserError(
            f"--slurm {options.slurm}: is for one sweep, and {' '.join(places)} is none; give its folder"
        )
    sweep = SweepFolder(places[0])
    words = [word for word in options.words if word != places[0]]
    if options.print:
        print(slurm.script_of(sweep, options.slurm, options.max_parallel, words), end="")
        return 0
    from rcpo.evaluation.tasks import Evaluation
    from rcpo.sweep.local import sweep_held

    Evaluation(option)
    with sweep_held(sweep):
        return slurm.submit(sweep, options.slurm, options.max_parallel, words)


def _runs_and_models(places: list[str]) -> list[str]:
    """Runs of folders, sweeps and patterns, and models. Raises UserError for what is neither."""
    from rcpo.comparison.find import find_runs, is_run
    from rcpo.models.places import is_adapter, refuse_no_run_or_model

    words = []
    for place in places:
        path = Path(place)
        is_model = (path / "config.json").is_file() or is_adapter(path)
        if is_run(path) or not (path.is_dir() or any(sign in place for sign in "*?[")) or is_model:
            words.append(place)
        else:
            words += [str(run) for run in find_runs([place])]
    for word in words:
        refuse_no_run_or_model(word)
    return words


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
    for task in tasks:
        _print_categories(console, task, found)


def _print_categories(
    console: "Console", task: str, found: "list[tuple[Subject, dict[str, TaskResult]]]"
) -> None:
    """A line a model and category, where questions have some; the same initial model once."""
    from rich.table import Table

    from rcpo.evaluation.results import INITIAL

    names = ("accuracy", "precision", "recall", "f1", "yes_rate", "generated_accuracy")
    table, seen = Table("model", "which", task, *names, box=None, pad_edge=False), set[str]()
    for subject, results in found:
        is_initial = subject.when == INITIAL
        if is_initial and subject.fingerprint in seen:
            continue
        seen |= {subject.fingerprint} if is_initial else set()
        metrics, name = results[task].metrics, "initial model" if is_initial else subject.name
        for category in dict.fromkeys(key.rpartition("/")[0] for key in metrics if "/" in key):
            own = [metrics.get(f"{category}/{each}") for each in names]
            numbers = ["-" if score is None else f"{score.value:.3f}" for score in own]
            table.add_row(name, "" if is_initial else subject.when, category, *numbers)
    if table.rows:
        console.print()
        console.print(table)


def _text(result: "TaskResult") -> str:
    name, score = result.main
    error = "" if score.stderr is None else f" ± {score.stderr:.3f}"
    return f"{name} {score.value:.3f}{error}"
