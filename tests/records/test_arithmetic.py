"""Word problems: right and near-miss answers read back from their sentences, disjoint sets, seeds."""

import re

import pytest

from rcpo.common.errors import UserError
from rcpo.records.arithmetic import (
    GAINS,
    NUMBERS,
    WORDS,
    Problem,
    all_problems,
    arithmetic_records,
    problem_split,
)

QUESTION = re.compile(r"(\w+) has (\w+) (\w+) and (\w+) (\w+) (more|of them) \. how many \?")
ANSWER = re.compile(r"(\w+) has (\w+) (\w+) now \.")


@pytest.fixture(scope="module")
def records():
    """The default sets of conf/data/arithmetic.yaml: (2048 training, 256 held-out)."""
    return arithmetic_records(2048, 256, 0)


def prompts(records):
    return [record.prompt[0]["content"] for record in records]


def test_a_problem_by_hand():
    """Three and four more is seven: near misses 5, 6, 8, 9. Nine minus nine is zero: near misses 1, 2."""
    gain = Problem("alice", "apples", "gets", 3, 4)
    assert gain.prompt() == "alice has three apples and gets four more . how many ?"
    assert gain.response(gain.answer) == "alice has seven apples now ."
    assert gain.near_misses() == [5, 6, 8, 9]
    loss = Problem("bob", "coins", "loses", 9, 9)
    assert loss.prompt() == "bob has nine coins and loses nine of them . how many ?"
    assert loss.response(loss.answer) == "bob has zero coins now ."
    assert loss.near_misses() == [1, 2]


def test_number_of_problems():
    """6 names x 5 items x (3 gains x 60 sums + 3 losses x 45 differences) = 9,450.

    Of 81 sums of 1..9 and 1..9, 6+5+4+3+2+1 = 21 are above 12; of 81 differences, 36 are below 0.
    """
    problems = list(all_problems())
    assert len(problems) == 9450
    assert len({problem.prompt() for problem in problems}) == 9450


def test_chosen_is_right_and_rejected_is_near(records):
    """Parsed back from the text alone: chosen = a + b or a - b, rejected off by one or two, else the same."""
    for record in (*records[0], *records[1]):
        assert [turn["role"] for turn in (*record.prompt, *record.chosen, *record.rejected)] == [
            "user",
            "assistant",
            "assistant",
        ]
        name, start, item, verb, change, _ = QUESTION.fullmatch(record.prompt[0]["content"]).groups()
        sign = 1 if verb in GAINS else -1
        right = NUMBERS.index(start) + sign * NUMBERS.index(change)
        chosen = ANSWER.fullmatch(record.chosen[0]["content"]).groups()
        rejected = ANSWER.fullmatch(record.rejected[0]["content"]).groups()
        assert chosen == (name, NUMBERS[right], item)
        assert (rejected[0], rejected[2]) == (name, item)
        assert 1 <= abs(NUMBERS.index(rejected[1]) - right) <= 2


def test_sets_are_disjoint_and_without_repeats(records):
    train, held_out = (prompts(part) for part in records)
    assert (len(train), len(held_out)) == (2048, 256)
    assert len(set(train) | set(held_out)) == 2048 + 256
    assert [record.row for record in records[1]] == list(range(256))


def test_the_seed_fixes_both_sets(records):
    assert arithmetic_records(2048, 256, 0) == records
    other = arithmetic_records(2048, 256, 1)
    assert prompts(other[0]) != prompts(records[0])
    assert prompts(other[1]) != prompts(records[1])


def test_more_training_pairs_leave_the_others_alone(records):
    """A smaller training set is the beginning of a larger one, and the held-out set does not move."""
    train, held_out = arithmetic_records(100, 256, 0)
    assert train == records[0][:100]
    assert held_out == records[1]


def test_every_word_is_used_and_none_is_missing():
    sentences = [
        text for problem in all_problems() for text in (problem.prompt(), problem.response(problem.answer))
    ]
    assert {word for sentence in sentences for word in sentence.split()} == set(WORDS)
    assert len(WORDS) == len(set(WORDS)) == 40


def test_too_many_pairs_are_refused_in_one_line():
    """9,450 problems: 9,194 + 256 is the most."""
    assert len(problem_split(9194, 256, 0)[0]) == 9194
    with pytest.raises(
        UserError, match=r"^data.train_pairs=9195 .* type data.train_pairs=9194 data.eval_pairs=256$"
    ):
        arithmetic_records(9195, 256, 0)
