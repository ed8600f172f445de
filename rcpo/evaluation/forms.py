"""Answers in the files that other tools read, by their names in `format=`.

    jsonl        a line an answer: prompt, response, messages, whether it was finished, and the row's own keys
    alpaca_eval  what `alpaca_eval --model_outputs FILE` reads: a JSON list of instruction, output, generator
    mt_bench     a line a question, as FastChat's llm_judge reads it from model_answer/MODEL.jsonl
    arena_hard   a line a question, as arena-hard-auto reads it from model_answer/MODEL.jsonl: 2.0 for rows
                 with uid, 0.1 for rows with question_id

Does not generate (`rcpo.evaluation.generation`)."""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rcpo.common.errors import UserError
from rcpo.evaluation.engines import TRANSFORMERS
from rcpo.evaluation.prompts import Prompt
from rcpo.records.messages import Messages, in_parts


@dataclass(frozen=True)
class Turn:
    """One answer."""

    text: str
    num_tokens: int
    is_finished: bool


@dataclass(frozen=True)
class Answered:
    """A prompt with its answers."""

    prompt: Prompt
    asked: str | Messages
    """What the model was asked first."""
    answers: list[list[Turn]]
    """For each answer to the prompt, its turns."""


def check_format(name: str, prompts: Sequence[Prompt], num_answers: int) -> None:
    """Raise UserError where the prompts lack what a format needs, before anything is generated."""
    for number, prompt in enumerate(prompts):
        fault = _fault(name, prompt)
        if fault is not None:
            raise UserError(f"format={name}: row {number} of the prompts (counted from 0) {fault}")
    if name in ("alpaca_eval", "arena_hard") and num_answers > 1:
        raise UserError(f"answers={num_answers}: format={name} has one answer a prompt; type answers=1")
    ids = [_id_of(prompt) for prompt in prompts] if name in ("mt_bench", "arena_hard") else []
    double = next((each for each in ids if ids.count(each) > 1), None)
    if double is not None:
        raise UserError(
            f"format={name}: two prompts have the id {double}; give each its own, or type format=jsonl"
        )


def _id_of(prompt: Prompt) -> Any:
    return prompt.row.get("question_id", prompt.row.get("uid"))


def _fault(name: str, prompt: Prompt) -> str | None:
    row = prompt.row
    if name == "alpaca_eval" and (prompt.later or _user_text(prompt) is None):
        return "is more than one user turn; give it an instruction, or type format=jsonl"
    if name == "mt_bench" and not isinstance(row.get("question_id"), int):
        return (
            "has no question_id that is a whole number, as MT-Bench's have; give it one, or type format=jsonl"
        )
    if name == "arena_hard" and not isinstance(row.get("uid", row.get("question_id")), str | int):
        return "has neither uid nor question_id, as Arena-Hard's have; give it one, or type format=jsonl"
    if name == "arena_hard" and "uid" in row and (prompt.later or _user_text(prompt) is None):
        return "is more than one user turn; give it one, or type format=jsonl"
    return None


def _user_text(prompt: Prompt) -> str | None:
    """The one user turn of a prompt; None where it has more."""
    if isinstance(prompt.opening, str):
        return prompt.opening
    said = [turn["content"] for turn in prompt.opening if turn["role"] != "system"]
    return str(said[0]) if len(said) == 1 else None


def written(name: str, answered: Sequence[Answered], generator: str, engine: str = TRANSFORMERS) -> str:
    """The file's text. `generator` is the model's name in it; lines of rcpo's own say another engine than
    transformers."""
    if name == "alpaca_eval":
        rows = [_alpaca(each, generator) for each in answered]
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    if name == "jsonl":
        by = {} if engine == TRANSFORMERS else {"engine": engine}
        lines = [line | by for number, each in enumerate(answered) for line in _plain(number, each)]
    else:
        now = time.time()
        form = _mt_bench if name == "mt_bench" else _arena_hard
        lines = [form(each, generator) | {"tstamp": now} for each in answered]
        if name == "mt_bench":  # FastChat keeps such files in the order of their questions
            lines.sort(key=lambda line: line["question_id"])
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _plain(number: int, answered: Answered) -> list[dict[str, Any]]:
    lines = []
    for idx, turns in enumerate(answered.answers):
        line: dict[str, Any] = {"index": number, "answer": idx, "prompt": in_parts(answered.asked)}
        line |= {
            "response": turns[-1].text,
            "finished": turns[-1].is_finished,
            "tokens": turns[-1].num_tokens,
        }
        if answered.prompt.later:
            line["turns"] = [turn.text for turn in turns]
        lines.append(line | {key: value for key, value in answered.prompt.row.items() if key not in line})
    return lines


def _alpaca(answered: Answered, generator: str) -> dict[str, Any]:
    row = answered.prompt.row
    known: dict[str, Any] = {key: row[key] for key in ("dataset", "datasplit") if key in row}
    said = {"instruction": _user_text(answered.prompt), "output": answered.answers[0][0].text}
    return {**known, **said, "generator": generator}


def _mt_bench(answered: Answered, generator: str) -> dict[str, Any]:
    """FastChat's fastchat/llm_judge/gen_model_answer.py."""
    number = answered.prompt.row["question_id"]
    choices = [
        {"index": idx, "turns": [turn.text for turn in turns]} for idx, turns in enumerate(answered.answers)
    ]
    return {
        "question_id": number,
        "answer_id": _digest(generator, number, choices),
        "model_id": generator,
        "choices": choices,
    }


def _arena_hard(answered: Answered, generator: str) -> dict[str, Any]:
    """arena-hard-auto's gen_answer.py, of 2.0 and of 0.1. Its token_len is tiktoken's; ours is the
    model's."""
    row, turns = answered.prompt.row, answered.answers[0]
    facts = {"token_len": turns[-1].num_tokens} | markdown_counts(turns[-1].text)
    if "uid" in row:
        said = {"role": "assistant", "content": {"answer": turns[0].text}}
        asked: Messages = [{"role": "user", "content": _user_text(answered.prompt)}]
        return {
            "uid": row["uid"],
            "ans_id": _digest(generator, row["uid"], said),
            "model": generator,
            "messages": [*asked, said],
            "metadata": facts,
        }
    choices = [{"index": 0, "turns": [{"content": turn.text} for turn in turns]}]
    return {
        "question_id": row["question_id"],
        "answer_id": _digest(generator, row["question_id"], choices),
        "model_id": generator,
        "choices": choices,
        "conv_metadata": facts,
    }


def markdown_counts(answer: str) -> dict[str, dict[str, int]]:
    """What Arena-Hard's style control reads of an answer: headers, lists and bold text outside of code."""
    prose = re.sub(r"```[^`]*```", "``````", answer)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, prose, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def _digest(*parts: Any) -> str:
    """An id of 22 characters: the same answer has the same one."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:22]
