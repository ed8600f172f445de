"""The answers of compared runs (metrics.answers) for the page: prompt, answer of the start, answers
of the last evaluation by calibration."""

from collections.abc import Sequence
from typing import NamedTuple

from rcpo.common.page import TableCell
from rcpo.comparison.groups import Group
from rcpo.runs.answers import Answer, read_answers
from rcpo.runs.folder import RunFolder

MOST_CHARACTERS = 600
"""Of a text in a cell."""


class Answers(NamedTuple):
    """A table of answers, of one run a group: the first."""

    num_prompts: int
    heads: list[TableCell]
    rows: list[list[TableCell]]


def answers_of(groups: Sequence[Group]) -> Answers | None:
    """None where no run has any."""
    last: dict[str, dict[int, Answer]] = {}
    for group in groups:
        known = read_answers(RunFolder(group.runs[0].path))
        if known:
            step = known[-1].step
            name = f"{group.calibration}, step {step}"
            last[name] = {each.pair: each for each in known if each.step == step}
    if not last:
        return None
    pairs = sorted({pair for answers in last.values() for pair in answers})
    heads = [TableCell(text, "left") for text in ("prompt", "start", *last)]
    rows = []
    for pair in pairs:
        one = next(answers[pair] for answers in last.values() if pair in answers)
        texts = [one.prompt, one.initial]
        texts += [answers[pair].now if pair in answers else "-" for answers in last.values()]
        rows.append([TableCell(_shortened(text), "text") for text in texts])
    return Answers(len(pairs), heads, rows)


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
