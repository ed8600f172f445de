"""RUN/evaluation.json and RUN/evaluation/: scores of a run's models on tasks, and of every question.

Owns the two's form. Loads nothing heavy: `rcpo.comparison` reads it. A task's entry is written when the task
is done, so an evaluation that was stopped goes on with the next task. Several processes may write other tasks
of one run."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError
from rcpo.common.files import replacing, write_atomically
from rcpo.common.locks import turn_at
from rcpo.evaluation.engines import TRANSFORMERS

FINAL = "final"
"""A run's model at its end, in results."""
FILE, FOLDER, LOCK = "evaluation.json", "evaluation", ".lock"
INITIAL = "step-000000"
"""The model that a run started from, in results."""


@dataclass(frozen=True)
class Score:
    """A metric of a task."""

    value: float
    stderr: float | None
    """Standard error over the questions; None where there is none."""


@dataclass(frozen=True)
class TaskResult:
    """What a model did on a task."""

    metrics: dict[str, Score]
    """The first is the one that tables show."""
    num_questions: int
    made_with: dict[str, Any]
    """Weights, settings and engine: equal where another evaluation would find the same."""
    source: str | None = None
    """Where the questions come from, where that may change: ID@COMMIT of a data set of the hub."""

    @property
    def main(self) -> tuple[str, Score]:
        return next(iter(self.metrics.items()))


def score_of(values: Sequence[float]) -> Score:
    """Mean over questions and its standard error."""
    num = len(values)
    mean = math.fsum(values) / num
    if num < 2:
        return Score(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (num - 1)
    return Score(mean, math.sqrt(variance / num))


class Results:
    """The results of one run."""

    def __init__(self, run: Path) -> None:
        """Raises UserError where evaluation.json is damaged."""
        self._run = run
        self._tree = _read(run / FILE)

    def of(self, when: str) -> dict[str, TaskResult]:
        """By task; `when` is final or step-N."""
        return self._tree.get(when, {})

    def add(self, when: str, task: str, result: TaskResult, questions: Sequence[dict[str, Any]]) -> None:
        """Write a task's scores and its questions. Raises OSError."""
        import pandas as pd

        place = questions_file(self._run, when, task)
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place, by_many=True) as beside:
            pd.DataFrame(list(questions)).to_parquet(beside)
        with turn_at(self._run / FOLDER / LOCK):
            self._tree = _read(self._run / FILE)  # another process may have added to it
            self._tree.setdefault(when, {})[task] = result
            tree = {
                when: {task: asdict(each) for task, each in tasks.items()}
                for when, tasks in self._tree.items()
            }
            write_atomically(self._run / FILE, json.dumps(tree, indent=2) + "\n")


def questions_file(run: Path, when: str, task: str) -> Path:
    """A row a question: id, value (of the first metric), and what was asked and answered."""
    return run / FOLDER / when / f"{task.replace('/', '-')}.parquet"


def _read(path: Path) -> dict[str, dict[str, TaskResult]]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {
            when: {task: result_of(entry) for task, entry in tasks.items()} for when, tasks in tree.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged; remove it, and evaluate again") from None


def result_of(entry: dict[str, Any]) -> TaskResult:
    """From plain containers. Raises KeyError, TypeError or ValueError for what is none."""
    metrics = {name: Score(**score) for name, score in entry["metrics"].items()}
    if not metrics:
        raise ValueError("no metric")
    # Before there were other engines, none was named.
    made_with = {"engine": TRANSFORMERS} | entry["made_with"]
    return TaskResult(metrics, entry["num_questions"], made_with, entry.get("source"))
