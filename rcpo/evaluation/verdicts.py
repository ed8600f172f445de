"""Verdicts of a judge on a run's answers, in the run's folder: a score like that of a task, with a row a
prompt, so that `rcpo compare` has a column of it.

Owns which row a prompt has there, and RUN/evaluation/judge/COLUMN.json with all numbers."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcpo.common.files import write_atomically
from rcpo.evaluation.answer_files import Duel
from rcpo.evaluation.results import FINAL, FOLDER, Results, Score, TaskResult, score_of
from rcpo.evaluation.win_rate import Verdicts, wins_of

FOLDER_NAME = "judge"
EVEN = 0.5
"""What a model wins against itself."""


def keep_win_rate(
    run: Path,
    column: str,
    metric: str,
    duels: Sequence[Duel],
    verdicts: Sequence[Verdicts],
    found: dict[str, Any],
) -> None:
    """Into evaluation.json, the rows and COLUMN.json; `found` is the whole comparison. A prompt without a
    verdict that can be read has no row. Raises OSError."""
    wins = wins_of(verdicts)
    rows: list[dict[str, Any]] = [
        {"id": each, "value": float(win), "answer": duel.a, "against": duel.b,
         "a_first": both[0] or "", "b_first": both[1] or ""}
        for each, win, duel, both in zip(_ids(duels), wins, duels, verdicts, strict=True)
        if not np.isnan(win)
    ]  # fmt: skip
    metrics = {metric: score_of([row["value"] for row in rows])}
    metrics["at equal length"] = Score(found["win_rate_at_equal_length"]["value"], None)
    made_with = {key: found[key] for key in ("a", "b", "judge")}
    folder = run / FOLDER / FOLDER_NAME
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{column}.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    Results(run).add(FINAL, column, TaskResult(metrics, len(rows), made_with), rows)


def keep_even(run: Path, column: str, metric: str, duels: Sequence[Duel]) -> None:
    """Of the run that others are judged against: half a win a prompt, so that differences to it are paired by
    prompt. Raises OSError."""
    rows = [
        {"id": each, "value": EVEN, "answer": duel.b, "against": duel.b, "a_first": "", "b_first": ""}
        for each, duel in zip(_ids(duels), duels, strict=True)
    ]
    metrics = {metric: Score(EVEN, None)}
    Results(run).add(FINAL, column, TaskResult(metrics, len(rows), {"itself": True}), rows)


def _ids(duels: Sequence[Duel]) -> list[str]:
    """The prompt, and its number where it is asked several times."""
    seen = Counter[str]()
    found = []
    for duel in duels:
        text = json.dumps(duel.prompt, ensure_ascii=False)
        seen[text] += 1
        found.append(text if seen[text] == 1 else f"{text} {seen[text]}")
    return found
