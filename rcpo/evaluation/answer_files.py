"""Two files of answers, as `rcpo generate` writes them, joined by their prompts. Loads nothing heavy."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError
from rcpo.evaluation.json_rows import json_rows

Conversation = list[dict[str, str]]
"""Turns with role and content."""


@dataclass(frozen=True)
class Duel:
    """A prompt with both answers."""

    prompt: Conversation
    a: str
    b: str

    @property
    def longer(self) -> int:
        """Characters that A's answer has more than B's."""
        return len(self.a) - len(self.b)


@dataclass(frozen=True)
class Joined:
    """What two files have in common."""

    duels: list[Duel]
    left_out: int
    """Prompts that are in one file only."""


def join_answers(a: Path, b: Path) -> Joined:
    """In the order of the first. Raises UserError where a file cannot be read, or no prompt is in both."""
    answers_a, answers_b = _answers(a), _answers(b)
    duels = [
        Duel(json.loads(key[0]), answer, answers_b[key])
        for key, answer in answers_a.items()
        if key in answers_b
    ]
    if not duels:
        raise UserError(f"{a} and {b}: have no prompt in common; give answers to the same prompts")
    return Joined(duels, len(answers_a) + len(answers_b) - 2 * len(duels))


def _answers(path: Path) -> dict[tuple[str, int], str]:
    """By prompt, and by number where a prompt has several answers."""
    found: dict[tuple[str, int], str] = {}
    counts: dict[str, int] = {}
    for number, row in enumerate(json_rows(path, str(path))):
        try:
            prompt, answer = _said(row)
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError(
                f"{path}: row {number} (counted from 0) has no prompt with its answer; give a file that "
                "`rcpo generate` wrote with format=jsonl, alpaca_eval or arena_hard (2.0)"
            ) from None
        key = json.dumps(prompt, sort_keys=True)
        found[key, counts.get(key, 0)] = answer
        counts[key] = counts.get(key, 0) + 1
    if not found:
        raise UserError(f"{path}: has no answers; give a file that `rcpo generate` wrote")
    return found


def _said(row: Any) -> tuple[Conversation, str]:
    """jsonl: prompt, response and, after a first turn, turns. alpaca_eval: instruction, output. Arena-Hard
    2.0: messages. Raises KeyError, TypeError, ValueError or IndexError for anything else."""
    if "response" in row:  # and the keys of the row that was asked, instruction perhaps
        return _conversation(row["prompt"]), "\n\n".join(map(_text, row.get("turns", [row["response"]])))
    if "instruction" in row:
        return _conversation(row["instruction"]), _text(row["output"])
    *asked, said = row["messages"]
    content = said["content"]
    return _conversation(asked), _text(content["answer"] if isinstance(content, dict) else content)


def _conversation(prompt: Any) -> Conversation:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": _text(turn["role"]), "content": _text(turn["content"])} for turn in prompt]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
