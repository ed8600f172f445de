"""The account of rows: it adds up, comes back whole from kept tokens, and is short in run.json; pairs keep
the order of their rows."""

import dataclasses
import json
from pathlib import Path

from helpers.inputs import config_of, row
from rcpo.records.account import Account, RowAccount, account_of
from rcpo.training.read_inputs import read_inputs

NAMES = ("alice", "bob", "carol", "dave", "emma", "frank")


def test_it_comes_back_whole_and_is_short_in_run_json() -> None:
    """20 rows: 5 dropped, 4 not drawn, 2 filtered, 3 held out and 6 trained on."""
    place = RowAccount("a", 20, {"y": [5], "x": [1, 2, 3, 4]}, undrawn=4, held_out=3, trained=8)
    account = Account(place, None, [6, 7, 8]).after_filter(6)
    assert account.lines() == [
        "a: 20 rows read",
        "  4 dropped because x (rows 1, 2, 3, ...)",
        "  1 dropped because y (row 5)",
        "  4 not drawn",
        "  2 left out by data.filter",
        "  3 held out, 6 to train on",
    ]
    assert account_of(json.loads(json.dumps(dataclasses.asdict(account)))) == account
    assert account.as_json() == {
        "training": {
            "place": "a", "read": 20, "identical": 0, "undrawn": 4, "filtered": 2, "held_out": 3,
            "trained": 6, "flipped": 0,
            "dropped": [
                {"reason": "x", "rows": 4, "first": [1, 2, 3]}, {"reason": "y", "rows": 1, "first": [5]},
            ],
        },
        "held_out": None, "held_out_rows": [6, 7, 8],
    }  # fmt: skip


def test_the_lost_share_is_of_the_rows_that_were_looked_at() -> None:
    """6 of the 10 that were drawn are lost; of 100 rows that would be 6 %."""
    account = Account(RowAccount("a", 100, {"x": list(range(6))}, undrawn=90, trained=4))
    assert account.warnings() == ["more than half of the data is lost: 6 of 10 rows of a are dropped (60%)"]
    assert Account(RowAccount("a", 10, {"x": [1, 2, 3, 4, 5]}, trained=5)).warnings() == []


def test_pairs_keep_the_order_of_slices_and_the_account_names_them_in_it(tmp_path: Path) -> None:
    """Rows 12 to 23 come first, as data.split says; tokens, held-out rows and pairs agree."""
    answers = ("one", "two", "three", "four")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row(NAMES[n % 6], answers[n // 6], "nine")) + "\n" for n in range(24)))
    data = {"source": "file", "path": str(path), "split": "train[12:]+train[:12]", "train_pairs": None}
    inputs = read_inputs(config_of(data={**data, "eval_pairs": 6}))
    for pairs in (inputs.train, inputs.held_out):
        rows = [pair.row for pair in pairs]
        assert rows == sorted(rows, key=lambda number: (number < 12, number))
        assert rows != sorted(rows)
    assert inputs.account.held_out_rows == [pair.row for pair in inputs.held_out]
