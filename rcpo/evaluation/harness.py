"""Tasks of lm-eval (the extra [evaluate]), used as a library: its own, and YAML files in a folder of the
user's.

Owns which tasks there are, which of them show images, and what of lm-eval's answer is kept. lm-eval asks the
model; rcpo has loaded it, so that adapters and checkpoints are what `rcpo.evaluation.subject` says."""

import contextlib
import difflib
import hashlib
import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from PIL import Image

from rcpo.common.errors import UserError, first_line
from rcpo.config.evaluation import refuse_missing_harness
from rcpo.data.pictures import sight_of
from rcpo.evaluation.decoding import see_masks
from rcpo.evaluation.engines import TRANSFORMERS, refuse_images
from rcpo.evaluation.results import Score, score_of
from rcpo.evaluation.subject import Loaded, Subject
from rcpo.records.readers import with_files

MOST_NAMED = 5
"""Names of tasks that an error lists."""
GENERATED = "generate_until"
"""lm-eval's kind of tasks whose answers are written."""


class Harness:
    """lm-eval with some of its tasks, loaded with their data: what is wrong with one is said before a model
    is loaded."""

    def __init__(self, names: Sequence[str], folder: Path | None, limit: int | None, is_chat: bool) -> None:
        """Raises UserError where lm-eval is not here, and for a task that there is not or that cannot be
        loaded."""
        refuse_missing_harness(names, f"tasks={names[0]}", "tasks=arithmetic")
        if folder is not None and not any(folder.glob("**/*.yaml")):
            raise UserError(f"tasks_dir={folder}: holds no .yaml file; give a folder of lm-eval's task files")
        self._limit, self._is_chat = limit, is_chat
        self._digests: dict[str, str] = {}
        with _quiet():
            self._manager = _manager(names, folder)
            self._loaded = {name: self._load(name) for name in names}

    def _load(self, name: str) -> Any:
        known = self._manager.task_index
        if name not in known:
            close = difflib.get_close_matches(name, known, n=MOST_NAMED)
            hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists lm-eval's"
            raise UserError(
                f"tasks={name}: no such task; {hint} arithmetic is rcpo's own; choose one of them"
            )
        try:
            loaded = self._manager.load([name])
        # A task file, its data and the hub raise whatever they like.
        except Exception as error:
            raise UserError(
                f"tasks={name}: cannot be loaded ({first_line(error)}); give a task whose data are on this "
                "machine, or mend its file"
            ) from None
        for task in loaded["tasks"].values():
            if task.config.doc_to_audio:
                raise UserError(
                    f"tasks={name}: plays sounds ({task.task_name}); give tasks of text and images"
                )
            if task.config.doc_to_image and task.OUTPUT_TYPE != GENERATED:
                raise UserError(
                    f"tasks={name}: shows images, and lm-eval asks such tasks for answers that are written "
                    f"alone; {task.task_name} has output_type {task.OUTPUT_TYPE}: give one of {GENERATED}"
                )
        return loaded

    def shows(self, name: str) -> bool:
        """Whether questions have images."""
        return any(task.config.doc_to_image for task in self._loaded[name]["tasks"].values())

    def refuse(self, name: str, subject: Subject) -> None:
        """Raise UserError where questions have images and the model reads text alone."""
        if self.shows(name) and sight_of(subject.tokenizer(may_see=True)) is None:
            raise UserError(
                f"tasks={name}: the questions have images, and {subject.name} reads text alone; give a "
                "vision-language model, or tasks of text"
            )
        if self.shows(name):
            refuse_images(subject.engine, f"the questions of tasks={name} have images")

    def digest(self, name: str) -> str:
        """Of what is asked: the task's settings, its version, its questions and the examples it shows."""
        if name not in self._digests:
            with _quiet():
                parts = [_asked(task) for task in self._loaded[name]["tasks"].values()]
            text = json.dumps([parts, self._limit, self._is_chat], sort_keys=True, default=str)
            self._digests[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._digests[name]

    def ask(self, name: str, loaded: Loaded, batch: int) -> tuple[dict[str, Score], list[dict[str, Any]]]:
        """Scores with lm-eval's standard errors, and a row a question. Raises UserError where lm-eval cannot
        ask them."""
        from lm_eval import simple_evaluate

        with _quiet(), _faults(name, loaded):
            found = simple_evaluate(
                self._model(name, loaded, batch),
                tasks=[name],
                task_manager=self._manager,
                limit=self._limit,
                apply_chat_template=self._is_chat,
            )
        rows, metrics = found["samples"], _scores(found["results"].get(name, {}))
        main = next(iter(metrics), None) or _first_metric(rows)
        questions = [_question(task, row, main) for task, own in rows.items() for row in own]
        if not metrics:  # a tag, or a group without a mean of its own
            metrics = {str(main): score_of([float(row["value"]) for row in questions])}
        return metrics, questions

    def _model(self, name: str, loaded: Loaded, batch: int) -> Any:
        """The loaded model as lm-eval knows models, of the subject's engine."""
        if loaded.subject.engine != TRANSFORMERS:
            return loaded.in_vllm.for_harness(loaded.tokenizer, batch)
        see_masks(loaded.model)
        if (sight := sight_of(loaded.tokenizer)) is not None:
            from rcpo.evaluation.harness_images import seeing_model

            return seeing_model(loaded, sight, batch, self.shows(name))
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch)


def _asked(task: Any) -> list[Any]:
    """Of a task that is loaded, what its scores depend on."""
    settings = task.config.to_dict()
    shown = _digest_of_rows(task.fewshot_docs()) if task.config.num_fewshot else None
    return [task.task_name, task.VERSION, _digest_of_rows(task.eval_docs), shown, settings]


def _digest_of_rows(rows: Any) -> str:
    """Of what rows hold; of an image, its file or its pixels."""
    if isinstance(rows, Dataset):
        rows = with_files(rows)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_in_words).encode())
    return digest.hexdigest()


def _in_words(value: object) -> str:
    """What JSON has no form for."""
    if isinstance(value, Image.Image):
        value = repr((value.mode, value.size)).encode() + value.tobytes()
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def _faults(name: str, loaded: Loaded) -> Iterator[None]:
    """Raise UserError for what a model, its processor or its template cannot take, and for an engine that
    fails in a process of its own."""
    if loaded.subject.engine != TRANSFORMERS:
        with loaded.in_vllm.one_line_faults("answer"):
            yield
        return
    try:
        yield
    # Each of them raises a class of its own.
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, TemplateError) as error:
        raise UserError(
            f"tasks={name}: lm-eval could not ask {loaded.subject.name} ({first_line(error)}); "
            "give another task, a smaller batch or limit, or mend its file"
        ) from error


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's own tasks are read, which takes seconds, where a name is not in `folder`."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder.absolute()), include_defaults=False)
        if set(names) <= set(own.task_index):
            return own
    return TaskManager(include_path=None if folder is None else str(folder.absolute()))


def _scores(results: dict[str, Any]) -> dict[str, Score]:
    """lm-eval's keys are METRIC,FILTER and METRIC_stderr,FILTER; the first filter of a metric is kept."""
    found: dict[str, Score] = {}
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float) or metric in found:
            continue
        error = _number(results.get(f"{metric}_stderr,{kind}"))
        found[metric] = Score(float(value), None if math.isnan(error) else error)
    return found


def _question(task: str, row: dict[str, Any], metric: str | None) -> dict[str, Any]:
    """One of lm-eval's rows as rcpo keeps it."""
    return {
        "id": f"{task}/{row['doc_id']}",
        "value": _number(row.get(str(metric))),
        "answer": _text(row["filtered_resps"]),
        "expected": _text(row.get("target")),
        "doc": _text(row["doc"]),
    }


def _number(value: object) -> float:
    """nan where a metric is no number of a question alone."""
    return float(value) if isinstance(value, int | float) else math.nan


def _first_metric(rows: dict[str, list[dict[str, Any]]]) -> str | None:
    return next((row["metrics"][0] for own in rows.values() for row in own if row.get("metrics")), None)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's lines are not rcpo's: warnings about a model that is loaded already, and a dump of
    settings."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
