"""Rows of several responses: what becomes of them, whatever their order, and which are unfit; what data.lists
makes of them."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_tokenizers import make_bpe
from rcpo.common.errors import UserError
from rcpo.config.schema import DataConfig
from rcpo.data.pairs import PackedPairs
from rcpo.data.tokenize import tokenize_records
from rcpo.records.arithmetic import arithmetic_records
from rcpo.records.lists import num_pairs, read_list
from rcpo.records.load import PreferenceData, load_records
from rcpo.records.record import BadRowError, PreferenceRecord


def load(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> PreferenceData:
    path = folder / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records(DataConfig(**{"source": "file", "path": str(path), "eval_pairs": 1, **keys}))


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_the_order_of_a_row_does_not_matter() -> None:
    """Best first; of equal scores by text. Ranks are scores with the lowest first."""
    found = {
        json.dumps([each.responses, each.scores, each.prompt])
        for order in itertools.permutations(["a", "b", "c", "d"])
        for each in (
            read_list("q", list(order), [{"a": 2, "b": 3, "c": 2, "d": 0}[name] for name in order], None, 0),
        )
    }
    assert found == {json.dumps([["b", "a", "c", "d"], [3.0, 2.0, 2.0, 0.0], "q"])}
    record = read_list("q", ["a", "b", "c"], None, [2, 1, 3], 7)
    assert (record.responses, record.scores, record.row) == (["b", "a", "c"], (-1, -2, -3), 7)
    assert (record.chosen, record.rejected) == ("b", "c")


def test_responses_are_what_sides_of_pairs_may_be(tmp_path: Path) -> None:
    """Messages, whole conversations, lists as text, and text pairs as chat."""
    asked = {"role": "user", "content": "q"}
    record = read_list("q", [turn("a"), turn("b"), turn("c")], [0, 1, 2], None, 0)
    assert (record.prompt, record.chosen, record.between) == ([asked], turn("c"), (turn("b"),))
    whole = [[asked, *turn("a")], [asked, *turn("b")]]
    assert read_list(None, whole, [0, 1], None, 0).prompt == [asked]
    assert read_list("q", "['a', 'b']", "[1, 2]", None, 0).responses == ["b", "a"]
    rows = [{"prompt": f"q{n}", "responses": ["a", "b", "c"], "scores": [n, 1, 2]} for n in (3, 4)]
    data = load(tmp_path, rows, as_chat=True)
    assert data.train[0].responses == [turn("a"), turn("c"), turn("b")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"responses": ["a"], "scores": [1]}, "there are 1 responses; a list has from 2 to 16"),
        (
            {"responses": [str(n) for n in range(17)], "scores": list(range(17))},
            "there are 17 responses; a list has from 2 to 16",
        ),
        ({"responses": ["a", "b"], "scores": [1, 2, 3]}, "there are 3 scores of 2 responses"),
        ({"responses": ["a", "b"], "scores": [1, math.nan]}, "one of the scores is not a finite number"),
        ({"responses": ["a", "b"], "scores": [True, 1]}, "one of the scores is not a finite number"),
        (
            {"responses": ["a", "b"], "scores": [1, 1]},
            "all responses are scored alike, so that none is better",
        ),
        ({"responses": ["a", "b"], "scores": None}, "scores and ranks are both null"),
        ({"responses": "a, b", "scores": [1, 2]}, "responses is null, or text that is no list"),
        ({"responses": {"a": 1}, "scores": [1, 2]}, "responses is dict, not a list"),
        ({"responses": ["a", "", "b"], "scores": [1, 2, 3]}, "a response is empty"),
        ({"responses": ["a", None], "scores": [1, 2]}, "a response is null"),
        ({"responses": ["a", "b", "a"], "scores": [1, 2, 3]}, "two responses are identical"),
        ({"responses": ["a", "b", "b"], "scores": [3, 2, 1]}, "two responses are identical"),
        ({"responses": ["a", turn("b")], "scores": [3, 2]}, "one response is text, the other messages"),
    ],
)
def test_a_bad_list_is_counted_by_its_reason(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    good = [{"prompt": f"q{n}", "responses": ["a", "b"], "scores": [1, 2]} for n in range(2)]
    data = load(tmp_path, [*good, {"prompt": "q", **row}], on_bad_row="drop")
    assert data.account.training.dropped == {reason: [2]}


def test_columns_of_other_names_and_of_both_kinds(tmp_path: Path) -> None:
    rows = [{"q": f"q{n}", "answers": ["a", "b"], "rewards": [1, 2], "ranks": [1, 2]} for n in range(2)]
    data = load(tmp_path, rows, columns={"prompt": "q", "responses": "answers", "scores": "rewards"})
    assert data.train[0].chosen == "b"
    named = [
        {"prompt": f"q{n}", "responses": ["a", "b"], "scores": [1, 2], "ranks": [1, 2]} for n in range(2)
    ]
    assert load(tmp_path, named).train[0].chosen == "b"
    assert load(tmp_path, named, columns={"responses": "responses", "ranks": "ranks"}).train[0].chosen == "a"
    with pytest.raises(UserError, match="has no column scores, but"):
        load(tmp_path, [{"prompt": "q", "responses": ["a", "b"]}] * 2, columns={"responses": "responses"})


RECORDS = [
    read_list("q1", [" a", " bb", " ccc", " dd"], [3, 2, 2, 1], None, 0),
    read_list("q2", [" a", " bb", " c"], [1, 3, 2], None, 1),
    PreferenceRecord("q3", " a", " b", 2),
]
"""Of four responses two are scored alike; of three; a pair."""


def texts(pairs: PackedPairs) -> list[tuple[str, ...]]:
    tokenizer = make_bpe()
    return [
        tuple(
            tokenizer.decode(side.input_ids[side.num_prompt :], skip_special_tokens=True).strip()
            for side in (pair.chosen, pair.rejected)
        )
        for pair in pairs
    ]


def tokenized(lists: str, records: list[PreferenceRecord] = RECORDS) -> PackedPairs:
    return tokenize_records(records, make_bpe(), 64, None, "error", lists=lists).pairs


def test_what_becomes_of_lists() -> None:
    """Of all pairs the tie is none; 5, 3 and 1 pairs a row, so weights 3/5, 1 and 3. Whole: two slots each."""
    assert texts(tokenized("best_worst")) == [("a", "dd"), ("bb", "a"), ("a", "b")]
    found = tokenized("all_pairs")
    assert texts(found) == [
        ("a", "bb"), ("a", "ccc"), ("a", "dd"), ("bb", "dd"), ("ccc", "dd"),
        ("bb", "c"), ("bb", "a"), ("c", "a"), ("a", "b"),
    ]  # fmt: skip
    assert found.arrays.weights.tolist() == pytest.approx([0.6] * 5 + [1] * 3 + [3])
    assert [num_pairs(record, "all_pairs") for record in RECORDS] == [5, 3, 1]
    whole = tokenized("whole")
    assert texts(whole) == [("a", "dd"), ("bb", "ccc"), ("bb", "a"), ("c", ""), ("a", "b"), ("", "")]
    assert (whole.slots, whole.num_lists, whole.num_rows) == (2, 3, 3)
    assert whole.arrays.scores.tolist() == [[3, 1], [2, 2], [3, 1], [2, 0], [1, 0], [0, 0]]


def test_pairs_alone_are_what_they_were() -> None:
    alone = [RECORDS[2]]
    assert tokenized("whole", alone) == tokenized("all_pairs", alone) == tokenized("best_worst", alone)
    assert tokenized("whole", alone)[0].scores is None


def test_the_responses_of_a_list_share_one_prompt_and_its_budget() -> None:
    """A long response of the middle cuts the prompt of all, as a long side of a pair does."""
    record = read_list("q " * 20, [" a", " b" * 40, " c"], [3, 2, 1], None, 0)
    pairs = tokenize_records([record], make_bpe(), 32, None, "error", lists="whole").pairs
    prompts = {tuple(side.input_ids[: side.num_prompt]) for pair in pairs for side in pair.sides}
    assert len(prompts) == 1
    assert len(prompts.pop()) == 16


def test_word_problems_with_several_answers() -> None:
    """The right one is best, scored 0; near misses by their distance. Two answers are as ever."""
    train, held_out = arithmetic_records(50, 10, 3, 4)
    assert {len(record.responses) for record in train} <= {3, 4}
    assert all(record.scores[0] == 0 > record.scores[1] >= record.scores[-1] for record in train)
    pairs, _ = arithmetic_records(50, 10, 3)
    assert [each.chosen for each in train] == [each.chosen for each in pairs]
    assert not pairs[0].scores
    assert arithmetic_records(50, 10, 3, 4) == (train, held_out)


def test_a_list_of_one_kind_needs_a_shared_prompt() -> None:
    with pytest.raises(BadRowError, match="the responses do not share one prompt"):
        read_list(None, ["the sky is blue", "the sky is red", "the sky was red"], [3, 2, 1], None, 0)
