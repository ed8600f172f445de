"""RUN/answers.jsonl: what the policy answered to held-out prompts, at the start and at each evaluation since.

One line an answer: {"step", "pair", "prompt", "answer"}. `rcpo.training.answers` writes it, `rcpo.report`
reads it.
"""

import json
from typing import Any, NamedTuple

from rcpo.common.files import write_atomically
from rcpo.runs.folder import RunFolder


class Answer(NamedTuple):
    """An answer beside that of the start."""

    step: int
    pair: int
    """Number of the held-out pair whose prompt it is."""
    prompt: str
    initial: str
    now: str


def append_answers(run: RunFolder, step: int, prompts: list[str], answers: list[str]) -> list[Answer]:
    """Write the answers of an evaluation, or of the start (step 0), and return them beside those of the
    start."""
    lines = [
        {"step": step, "pair": pair, "prompt": prompt, "answer": answer}
        for pair, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    with run.answers.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return [answer for answer in read_answers(run) if answer.step == step]


def read_answers(run: RunFolder) -> list[Answer]:
    """All of a run's, in the order of its steps; those of the start are compared with themselves. None where
    there is no file; a line that was cut short is left out."""
    lines = _lines(run)
    first = {line["pair"]: line["answer"] for line in lines if line["step"] == 0}
    return [
        Answer(line["step"], line["pair"], line["prompt"], first.get(line["pair"], ""), line["answer"])
        for line in lines
    ]


def rewind_answers(run: RunFolder, step: int) -> None:
    """Drop answers after `step`, so that a resumed run writes each of them once."""
    if run.answers.is_file():
        kept = [json.dumps(line, ensure_ascii=False) for line in _lines(run) if line["step"] <= step]
        write_atomically(run.answers, "".join(f"{line}\n" for line in kept))


def _lines(run: RunFolder) -> list[dict[str, Any]]:
    """Whole ones."""
    if not run.answers.is_file():
        return []
    found = []
    for text in run.answers.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            line = json.loads(text)
            if {"step", "pair", "prompt", "answer"} <= line.keys():
                found.append(line)
        except (ValueError, AttributeError):
            continue
    return found
