"""The task `yes_no`: questions that yes or no answers, about an image mostly, as POPE has them (Li et al.
2023, arXiv 2305.10355).

A question is scored twice. By log-probability: whether yes is likelier than no as the first token of the
answer; p(yes) is the sum over yes and Yes, as far as the model has tokens for them. By generation: the first
word of a greedy answer; one that begins with neither is unreadable. Both come from one pass.

Does not read the questions (`rcpo.evaluation.questions`). Called by `rcpo.evaluation.tasks`."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.config.evaluation import YES_NO, EvaluationConfig
from rcpo.data.tokenize import tokenize_records
from rcpo.evaluation.decoding import Answer, Decoding, answer_all
from rcpo.evaluation.engines import refuse_images
from rcpo.evaluation.generation import asked_first
from rcpo.evaluation.questions import Question, read_questions
from rcpo.evaluation.results import Score, score_of
from rcpo.evaluation.subject import Loaded, Subject
from rcpo.records.arithmetic import assistant_turn, user_turn
from rcpo.records.record import PreferenceRecord

WORDS = (("yes", "no"), ("Yes", "No"))
"""How an answer may begin."""
NEW_TOKENS = 8
"""Of an answer, of which the first word counts."""
UNREADABLE = "unreadable"
NO_CATEGORY = "none"
"""Of rows without one, among others that have one."""


class Questions:
    """All questions of a run of `rcpo evaluate`, and their asking."""

    def __init__(self, config: EvaluationConfig) -> None:
        """Raises UserError where they cannot be read: `read_questions`."""
        self._set = read_questions(config)
        self.questions, self.digest, self.source = self._set.questions, self._set.digest, self._set.source

    def refuse(self, subject: Subject) -> None:
        """Raise UserError where the model reads text alone and a question shows an image, or where it has no
        words for an answer."""
        if self._set.have_images and not subject.sees:
            raise UserError(
                f"tasks={YES_NO}: the questions have images, and {subject.name} reads text alone; give a "
                "vision-language model, or questions without images"
            )
        if self._set.have_images:
            refuse_images(subject.engine, f"the questions of tasks={YES_NO} have images")
        tokenizer = subject.tokenizer(may_see=True)
        if tokenizer.chat_template is not None:
            first_tokens(tokenizer, subject.model.chat_template_kwargs)

    def ask(self, loaded: Loaded, batch: int) -> tuple[dict[str, Score], list[dict[str, Any]]]:
        """Scores, of log-probabilities first, and a row a question."""
        asking, subject = loaded.asking, loaded.subject
        yes, no = first_tokens(loaded.tokenizer, subject.model.chat_template_kwargs)
        prompts = [question.prompt for question in self.questions]
        asked = asked_first(asking, prompts, self._set.where, None)
        decoding = Decoding(max_new_tokens=NEW_TOKENS, answers_per_batch=batch)
        answers: dict[int, Answer] = {}
        for found in answer_all(loaded.writer, asked, decoding, asking.stop_ids, asking.pad_id, [*yes, *no]):
            answers |= found
        rows = []
        for place, question in enumerate(self.questions):
            answer = answers[place]
            if not answer.watched:
                raise UserError(f"{self._set.where}: row {place} (counted from 0) leaves the model no room")
            log_yes, log_no = _log_sum(answer.watched[: len(yes)]), _log_sum(answer.watched[len(yes) :])
            rows.append(_row(place, question, log_yes - log_no, asking.text(answer.ids)))
        return scores(rows), rows


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Ids of the tokens that an answer with yes, and with no, begins with, behind the generation prompt.
    Raises UserError where the tokenizer has no two such words that begin with other tokens."""
    records = [
        PreferenceRecord(user_turn("?"), assistant_turn(yes), assistant_turn(no), row)
        for row, (yes, no) in enumerate(WORDS)
    ]
    pairs = tokenize_records(records, tokenizer, 10**6, None, "drop", template_kwargs, False).pairs
    firsts = [
        (pair.chosen.ids[pair.chosen.num_prompt], pair.rejected.ids[pair.rejected.num_prompt])
        for pair in pairs
    ]
    known = [both for both in firsts if both[0] != both[1] and tokenizer.unk_token_id not in both]
    yes, no = (list(dict.fromkeys(both[side] for both in known)) for side in (0, 1))
    if not known or set(yes) & set(no):
        raise UserError(
            f"tasks={YES_NO}: the model's tokenizer writes yes and no as the same token, or has no word for "
            "them; give a model that has"
        )
    return yes, no


class Counts(NamedTuple):
    """What was said, of the questions whose right answer is yes, and no."""

    hits: list[float]
    """1 where the right one was said, else 0; of all questions."""
    said: list[float]
    """1 where yes was said."""
    is_yes: list[bool]

    def scores(self, before: str) -> dict[str, Score]:
        """With `before` in front of each name. Means have standard errors over the questions that they are
        of; one of no question is left out."""
        of_said = [float(label) for label, said in zip(self.is_yes, self.said, strict=True) if said]
        of_yes = [said for label, said in zip(self.is_yes, self.said, strict=True) if label]
        found = {"accuracy": score_of(self.hits)}
        if of_said:
            found["precision"] = score_of(of_said)
        if of_yes:
            found["recall"] = score_of(of_yes)
        if of_said or of_yes:
            # 2 TP / (2 TP + FP + FN): yes was said FP + TP times, and was right FN + TP times
            found["f1"] = Score(2 * sum(of_yes) / (len(of_said) + len(of_yes)), None)
        found["yes_rate"] = score_of(self.said)
        return {f"{before}{name}": score for name, score in found.items()}


def scores(rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """Of all rows, and of each category, where there are several, behind CATEGORY/."""
    found = _scores(rows)
    categories = dict.fromkeys(row.get("category") for row in rows)
    for each in categories if len(categories) > 1 else ():
        own = _scores([row for row in rows if row.get("category") == each])
        found |= {f"{each or NO_CATEGORY}/{name}": score for name, score in own.items()}
    return found


def _scores(rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """accuracy, precision, recall, f1 (of yes) and yes_rate by log-probability; the same by generation behind
    `generated_`, where an unreadable answer is wrong and no yes, and `unreadable`, their share."""
    is_yes = [row["label"] == "yes" for row in rows]
    by_z = Counts([row["value"] for row in rows], [float(row["log_odds"] > 0) for row in rows], is_yes)
    hits = [float(row["said"] == row["label"]) for row in rows]
    by_words = Counts(hits, [float(row["said"] == "yes") for row in rows], is_yes)
    lost = score_of([float(row["said"] == UNREADABLE) for row in rows])
    return by_z.scores("") | by_words.scores("generated_") | {UNREADABLE: lost}


def first_word(answer: str) -> str:
    """yes or no, as which the answer begins, or unreadable."""
    word = re.match(r"\W*(\w+)", answer)
    said = "" if word is None else word[1].casefold()
    return said if said in ("yes", "no") else UNREADABLE


def _row(place: int, question: Question, log_odds: float, answer: str) -> dict[str, Any]:
    label = "yes" if question.is_yes else "no"
    # Neither is likelier: half right.
    value = 0.5 if log_odds == 0 else float((log_odds > 0) == question.is_yes)
    return {
        "id": str(place),
        "category": question.category,
        "value": value,
        "label": label,
        "log_odds": log_odds,
        "said": first_word(answer),
        "answer": answer,
        "question": question.text,
    }


def _log_sum(values: Sequence[float]) -> float:
    """log of the sum of the probabilities; -inf of none."""
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(each - largest) for each in values))
