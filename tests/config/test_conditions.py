"""train.stop_when and train.keep_best: what they say, and that they name what an evaluation has."""

import math

import pytest
import torch

from rcpo.commands.train import prepare
from rcpo.common.errors import UserError
from rcpo.config.conditions import keys_of, parse_best, parse_condition
from rcpo.config.words import hydra_words
from rcpo.method.metrics import displacement_row
from rcpo.training.after_evaluation import best_row


@pytest.mark.parametrize(
    ("text", "chosen", "margin", "holds"),
    [
        ("eval/displacement/chosen < -5", -5.1, 0, True),
        ("eval/displacement/chosen < -5", -5.0, 0, False),
        ("eval/displacement/chosen <= -5", -5.0, 0, True),
        ("eval/displacement/chosen<-5e0", -5.1, 0, True),
        ("eval/displacement/chosen > -5 and eval/displacement/margin >= 1", 0, 1, True),
        ("eval/displacement/chosen > -5 and eval/displacement/margin >= 1", 0, 0.9, False),
        ("eval/displacement/chosen > 9 or eval/displacement/margin > 0", 0, 1, True),
        # `and` first: the first alternative alone decides, whatever the others say.
        (
            "eval/displacement/chosen > -1 or eval/displacement/chosen > 9 and eval/displacement/margin > 9",
            0, 0, True,
        ),
        ("eval/displacement/chosen < 1", math.nan, 0, False),
        ("eval/displacement/chosen > 1", math.nan, 0, False),
        ("eval/displacement/chosen < 1", -math.inf, 0, True),
    ],
)  # fmt: skip
def test_a_condition_holds_by_hand(text: str, chosen: float, margin: float, holds: bool) -> None:
    row = {"displacement/chosen": chosen, "displacement/margin": margin}
    assert parse_condition(text).holds(row) is holds


@pytest.mark.parametrize(
    "text",
    [
        "eval/displacement/chosen", "< 3", "eval/a < b", "eval/a < 1 < 2", "eval/a == 1", "eval/a < nan",
        "not eval/a < 1", "eval/a < 1 and", "(eval/a < 1)", "__import__('os').getcwd() < 1", "eval/a < 1; 2",
    ],
)  # fmt: skip
def test_what_is_no_comparison_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"type train\.stop_when='eval/displacement/chosen < -5'"):
        parse_condition(text)


def test_the_best_is_the_largest_unless_fewer_is_better_or_the_words_say_so() -> None:
    rows = [
        {"step": step, "displacement/margin": margin, "displacement/chosen_down": down, "loss": -step}
        for step, margin, down in (
            (0, 9.0, 0.0),
            (1, 1.0, 0.5),
            (2, math.nan, 0.4),
            (3, 2.0, 0.4),
            (4, 2.0, 0.6),
        )
    ]
    expected = {
        "eval/displacement/margin": 3, "min:eval/displacement/margin": 1, "eval/displacement/chosen_down": 2,
        "max:eval/displacement/chosen_down": 4, "eval/loss": 4, "max:eval/loss": 1,
    }  # fmt: skip
    found = {text: best_row(rows, parse_best(text)) for text in expected}
    assert {text: row and row["step"] for text, row in found.items()} == expected
    assert best_row(rows[:1], parse_best("eval/displacement/margin")) is None


def test_the_keys_are_those_that_evaluations_have() -> None:
    """By the function that makes the rows: of a plain run, one in bf16, one that probes. The loss is the
    loop's; an objective that weighs tokens has none."""
    z = torch.arange(4.0)
    rows = [
        displacement_row(z, z, z, z),
        displacement_row(z, z, z, z, noise=0.1),
        displacement_row(z, z, z, z, num_probed=2),
    ]
    words = (
        ["model.dtype=float32"],
        ["model.dtype=bfloat16"],
        ["model.dtype=float32", "calibration=balance"],
    )
    for row, given in zip(rows, words, strict=True):
        config = prepare(["train.device=cpu", *given])
        assert config is not None
        assert set(keys_of(config, reads_tokens=False)) == {*row, "loss"}
        assert set(keys_of(config, reads_tokens=True)) == set(row)


def test_a_condition_needs_no_quotes_for_hydra() -> None:
    assert hydra_words(["train.stop_when=eval/displacement/chosen < -5"], []) == [
        'train.stop_when="eval/displacement/chosen < -5"'
    ]
    for quoted in ("train.stop_when='a < 1'", 'train.stop_when="a < 1"', "train.stop_when=null"):
        assert hydra_words([quoted], []) == [quoted]
