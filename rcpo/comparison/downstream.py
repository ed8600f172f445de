"""Scores of a run's model on tasks, as `rcpo evaluate` has left them, question by question.

Read without torch. What a score means, `rcpo.evaluation` says; here it is a column, downstream/TASK."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rcpo.common.errors import UserError
from rcpo.evaluation.results import FINAL, INITIAL, Results, questions_file

PREFIX = "downstream/"


@dataclass(frozen=True)
class Downstream:
    """A run's model at its end on one task."""

    metric: str
    value: float
    initial: float | None
    """Of the model that the run started from."""
    engine: str
    """What asked them: scores of different engines are not subtracted."""
    questions: dict[str, float]
    """Value by question; empty where they are not there any more."""


def read_downstream(run: Path) -> dict[str, Downstream]:
    """By task. Raises UserError where a file of it is damaged."""
    results = Results(run)
    before = results.of(INITIAL)
    found = {}
    for task, result in results.of(FINAL).items():
        metric, score = result.main
        initial = before[task].metrics.get(metric) if task in before else None
        questions = _questions(questions_file(run, FINAL, task))
        found[task] = Downstream(
            metric,
            score.value,
            None if initial is None else initial.value,
            str(result.made_with.get("engine")),
            questions,
        )
    return found


def _questions(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    import pyarrow as pa
    from pyarrow import parquet

    try:
        columns = parquet.read_table(path, columns=["id", "value"]).to_pydict()
    except (OSError, pa.ArrowException, ValueError, KeyError):
        raise UserError(f"{path}: is damaged; remove it, and evaluate again") from None
    return {str(idx): float(value) for idx, value in zip(columns["id"], columns["value"], strict=True)}


def differences_by_question(pairs: Sequence[tuple[Downstream, Downstream]]) -> np.ndarray | None:
    """(S seeds, n questions) of one's value less the other's; None where the questions are not the same."""
    ids = list(pairs[0][0].questions)
    if not ids or any(set(side.questions) != set(ids) for both in pairs for side in both):
        return None
    return np.array([[one.questions[idx] - other.questions[idx] for idx in ids] for one, other in pairs])
