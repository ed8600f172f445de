"""The task `arithmetic`: held-out word problems, and whether the generated answer is the right sentence.

Needs no network and no file: the problems are those of `data=arithmetic`. Called by `rcpo.evaluation.tasks`
and, for its prompts, by `rcpo.commands.generate`."""

from typing import Any

from rcpo.common.conf import value_in_conf
from rcpo.evaluation.decoding import Asked, Decoding, answer_all
from rcpo.evaluation.prompts import Asking, Prompt
from rcpo.evaluation.results import Score, score_of
from rcpo.evaluation.subject import Loaded, Subject
from rcpo.records.arithmetic import Problem, problem_split, user_turn

NEW_TOKENS = 16
"""A right answer has six and an end."""


def problems_of(subject: Subject) -> list[Problem]:
    """The held-out problems of a run on word problems; of other runs and models those of the default
    config."""
    data = None if subject.config is None else subject.config.data
    if data is not None and data.source == "arithmetic":
        num, seed = data.eval_pairs, data.seed
    else:
        num, seed = (value_in_conf(("data/arithmetic",), key) for key in ("eval_pairs", "seed"))
    return problem_split(0, num, seed)[1]


def ask(loaded: Loaded, batch: int) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Scores, and a row a problem. exact_match: the answer is the right sentence, word for word; near_miss:
    the right sentence with a number one or two off, as rejected responses have it; other: anything else."""
    problems = problems_of(loaded.subject)
    asking: Asking = loaded.asking
    prompts = [Prompt(user_turn(problem.prompt())) for problem in problems]
    asked = [Asked(asking.ids(asking.conversation(prompt)), "") for prompt in prompts]
    decoding = Decoding(max_new_tokens=NEW_TOKENS, answers_per_batch=batch)
    answers: dict[int, str] = {}
    for found in answer_all(loaded.writer, asked, decoding, asking.stop_ids, asking.pad_id):
        answers |= {place: asking.text(answer.ids) for place, answer in found.items()}
    rows = [_row(problem, answers[place]) for place, problem in enumerate(problems)]
    kinds = ("exact_match", "near_miss", "other")
    return {kind: score_of([float(row["kind"] == kind) for row in rows]) for kind in kinds}, rows


def _row(problem: Problem, answer: str) -> dict[str, Any]:
    kind = kind_of(problem, answer)
    return {
        "id": problem.prompt(),
        "value": float(kind == "exact_match"),
        "kind": kind,
        "expected": problem.response(problem.answer),
        "answer": answer,
    }


def kind_of(problem: Problem, answer: str) -> str:
    """exact_match, near_miss or other."""
    if answer == problem.response(problem.answer):
        return "exact_match"
    is_near = answer in map(problem.response, problem.near_misses())
    return "near_miss" if is_near else "other"
