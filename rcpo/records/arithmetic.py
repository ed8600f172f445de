"""Word problems made on the spot: the right answer is chosen, a near miss is rejected.

Owns the sentences of `data=arithmetic`, their words (the vocabulary of `model=tiny`) and the split into
training and held-out problems. Does not tokenise. Called by `rcpo.records.load` and `rcpo.builtin.make_tiny`.
"""

import functools
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from rcpo.common.errors import UserError
from rcpo.records.lists import read_list
from rcpo.records.record import Messages, PreferenceRecord

NAMES = ("alice", "bob", "carol", "dave", "emma", "frank")
ITEMS = ("apples", "books", "coins", "pears", "shells")
GAINS = ("gets", "finds", "buys")
LOSSES = ("loses", "sells", "drops")
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
"""Number words; a number's place is its value."""
OTHER_WORDS = ("has", "and", "more", "of", "them", ".", "how", "many", "?", "now")
WORDS = (*NAMES, *ITEMS, *GAINS, *LOSSES, *NUMBERS, *OTHER_WORDS)
"""Every word that a problem or an answer can hold."""

LARGEST = len(NUMBERS) - 1
"""The largest answer, right or wrong."""
OPERANDS = range(1, 10)
"""What a problem starts with, and what comes or goes."""
MISSES = (-2, -1, 1, 2)
"""How far a near miss is from the right answer."""


@dataclass(frozen=True)
class Problem:
    """One word problem."""

    name: str
    item: str
    verb: str
    start: int
    """How many there are at first, in `OPERANDS`."""
    change: int
    """How many come or go, in `OPERANDS`."""

    @property
    def answer(self) -> int:
        """start + change for a verb of gain, start - change for one of loss."""
        return self.start + self.change if self.verb in GAINS else self.start - self.change

    def prompt(self) -> str:
        """The question, such as "alice has three apples and gets four more . how many ?"."""
        how = "more" if self.verb in GAINS else "of them"
        start, change = NUMBERS[self.start], NUMBERS[self.change]
        return f"{self.name} has {start} {self.item} and {self.verb} {change} {how} . how many ?"

    def response(self, number: int) -> str:
        """A sentence that answers `number`, such as "alice has seven apples now ."."""
        return f"{self.name} has {NUMBERS[number]} {self.item} now ."

    def near_misses(self) -> list[int]:
        """Wrong answers that are off by one or two and have a number word."""
        return [self.answer + off for off in MISSES if 0 <= self.answer + off <= LARGEST]


def all_problems() -> Iterator[Problem]:
    """Every problem whose answer has a number word, in a fixed order, each once."""
    for parts in itertools.product(NAMES, ITEMS, GAINS + LOSSES, OPERANDS, OPERANDS):
        problem = Problem(*parts)
        if 0 <= problem.answer <= LARGEST:
            yield problem


def problem_split(train: int, held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """`train` and `held_out` problems without a prompt in common, drawn by `seed`.

    The held-out set depends on `seed` and `held_out` alone, so that more training pairs never move it.
    Raises UserError where there are not that many different problems.
    """
    problems = list(all_problems())
    if train + held_out > len(problems):
        held_out_fits = min(held_out, 256)
        train_fits = min(train, len(problems) - held_out_fits)
        raise UserError(
            f"data.train_pairs={train} data.eval_pairs={held_out}: there are {len(problems)} different "
            f"problems for both; type data.train_pairs={train_fits} data.eval_pairs={held_out_fits}"
        )
    random.Random(seed).shuffle(problems)
    return problems[held_out : held_out + train], problems[:held_out]


def arithmetic_records(
    train_pairs: int, eval_pairs: int, seed: int, responses: int = 2
) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
    """Training and held-out pairs, disjoint by prompt, as messages; each set's rows are counted from 0.

    The responses of a pair differ in the number word only. With more than two `responses` a record is a list
    of the right answer and as many near misses as there are and are wanted; an answer's score is the
    negative of its distance from the right one. The same arguments give the same pairs.
    Raises UserError where there are not that many different problems.
    """
    train, held_out = problem_split(train_pairs, eval_pairs, seed)
    seeds = f"training misses {seed}", f"held-out misses {seed}"
    make = _records if responses == 2 else functools.partial(_lists, num_misses=responses - 1)
    return make(train, seeds[0]), make(held_out, seeds[1])


def _lists(problems: list[Problem], seed: str, num_misses: int) -> list[PreferenceRecord]:
    rng, records = random.Random(seed), []
    for row, problem in enumerate(problems):
        misses = problem.near_misses()
        numbers = [problem.answer, *rng.sample(misses, min(num_misses, len(misses)))]
        responses = [assistant_turn(problem.response(number)) for number in numbers]
        scores = [-abs(number - problem.answer) for number in numbers]
        records.append(read_list(user_turn(problem.prompt()), responses, scores, None, row))
    return records


def _records(problems: list[Problem], seed: str) -> list[PreferenceRecord]:
    rng = random.Random(seed)
    return [
        PreferenceRecord(
            prompt=user_turn(problem.prompt()),
            chosen=assistant_turn(problem.response(problem.answer)),
            rejected=assistant_turn(problem.response(rng.choice(problem.near_misses()))),
            row=row,
        )
        for row, problem in enumerate(problems)
    ]


def user_turn(content: str) -> Messages:
    """A conversation of one user message."""
    return [{"role": "user", "content": content}]


def assistant_turn(content: str) -> Messages:
    """A response of one assistant message."""
    return [{"role": "assistant", "content": content}]
