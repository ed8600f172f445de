"""Which answers refuse, and pairs of a model's own answers in which the refusal is chosen.

Owns the rules, the classifier as a labeller, and how ties are broken. Does not generate answers (`rcpo
generate`) or train (`rcpo.commands.lab_refusal` has `rcpo sweep` do it)."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from rcpo.evaluation.answer_files import Conversation, Duel
from rcpo.evaluation.classifier_judge import ClassifierJudge

PHRASES = (
    "i'm sorry", "i am sorry", "sorry, but", "i apologize", "my apologies", "i cannot", "i can't",
    "i can not", "i could not", "i couldn't", "i won't", "i will not", "i would not", "i wouldn't",
    "i'm unable", "i am unable", "i'm not able", "i am not able", "i'm not going to", "i refuse",
    "i must decline", "i decline", "i do not feel comfortable", "i don't feel comfortable",
    "i'm not comfortable", "i am not comfortable", "as an ai", "as a language model",
    "not appropriate", "is inappropriate", "against my", "is illegal", "is unethical", "is not ethical",
)  # fmt: skip
"""An answer that has one of these near its beginning refuses, whatever its case."""
LETTERS = 200
"""How far an answer is looked at: a refusal comes early, and long answers say much."""


class Label(NamedTuple):
    refuses: bool
    score: float | None = None
    """Of a classifier: the higher one is preferred among two alike."""


Asked = tuple[Conversation, str]
"""A prompt and an answer to it."""


class Labeller(Protocol):
    name: str
    unreadable: int
    """Replies that could not be read."""

    def labels(self, asked: Sequence[Asked]) -> list[Label]:
        """Of each answer."""


class _OneByOne:
    """Labels each answer by itself."""

    unreadable = 0

    def labels(self, asked: Sequence[Asked]) -> list[Label]:
        return [self.label(prompt, answer) for prompt, answer in asked]

    def label(self, prompt: Conversation, answer: str) -> Label:
        raise NotImplementedError


class Rules(_OneByOne):
    """By phrases. No judgement: it takes "I can't wait to help" for a refusal, and misses one in other
    words."""

    name = "rules"

    def __init__(self, phrases: Sequence[str] = PHRASES) -> None:
        self._phrases = tuple(_plain(phrase) for phrase in phrases)

    def label(self, prompt: Conversation, answer: str) -> Label:
        beginning = _plain(answer)[:LETTERS]
        return Label(any(phrase in beginning for phrase in self._phrases))


class Classifier(_OneByOne):
    """By a sequence classifier of one number (`ClassifierJudge`): above `threshold` an answer counts as
    refused. An answer that it cannot score does not."""

    def __init__(self, path: str, threshold: float) -> None:
        """Raises UserError where it cannot be used."""
        self._judge, self._threshold = ClassifierJudge(path), threshold
        self.name = f"{self._judge.name} > {threshold:g}"

    def label(self, prompt: Conversation, answer: str) -> Label:
        score = self._judge.score(Duel(prompt, answer, answer), answer)
        return Label(score is not None and score > self._threshold, score)


def _plain(text: str) -> str:
    return " ".join(text.replace("\u2019", "'").lower().split())


class Answered(NamedTuple):
    """A prompt with two answers of the model and their labels."""

    prompt: Any
    """Text or messages, as it was asked."""
    answers: tuple[str, str]
    labels: tuple[Label, Label]


def make_pairs(
    answered: Sequence[Answered], ties: str, seed: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of prompt, chosen and rejected, and what became of the prompts. Where one answer refuses it is
    chosen. Of two that are alike the one with the higher score is, else `ties` decides: draw (by seed and
    prompt) or drop. Left out are answers that are the same, and prompts with an empty one."""
    rows: list[dict[str, Any]] = []
    counts = Counter({"one refuses": 0, "both refuse": 0, "none refuses": 0})
    for number, (prompt, answers, labels) in enumerate(answered):
        if not all(map(str.strip, answers)) or answers[0].split() == answers[1].split():
            counts["left out: the same answer twice, or an empty one"] += 1
            continue
        first, second = labels
        if first.refuses != second.refuses:
            counts["one refuses"] += 1
            place = 0 if first.refuses else 1
        else:
            counts["both refuse" if first.refuses else "none refuses"] += 1
            is_scored = first.score is not None and second.score is not None and first.score != second.score
            if not is_scored and ties == "drop":
                counts["left out: a tie"] += 1
                continue
            if is_scored:
                place = 0 if first.score > second.score else 1  # type: ignore[operator]  # is_scored
            else:
                place = random.Random(f"{seed} {number}").randrange(2)
        rows.append(_row(prompt, answers[place], answers[1 - place]))
    return rows, dict(counts)


def _row(prompt: Any, chosen: str, rejected: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    turns = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return {"prompt": prompt, "chosen": turns[0], "rejected": turns[1]}
