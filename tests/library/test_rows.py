"""Rows in memory become a file that a config can name, whatever holds them; what is no row is one line."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import rcpo
from rcpo.config.schema import DataConfig
from rcpo.library.rows import kept_rows
from rcpo.records.load import load_records

ROWS = [
    {"prompt": f"p {idx}", "chosen": f" yes\u2028{idx}", "rejected": " no", "weight": idx / 2}
    for idx in range(4)
]
TURNS = [
    {
        "prompt": [{"role": "user", "content": f"p {idx}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for idx in range(4)
]
HOLDERS = {
    "list": lambda rows: rows,
    "generator": iter,
    "dataset": datasets.Dataset.from_list,
    "frame": pd.DataFrame,
    "arrow": pa.Table.from_pylist,
}


@pytest.mark.parametrize("rows", [ROWS, TURNS], ids=["text", "messages"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_whatever_holds_the_rows_the_file_is_the_same(holder: str, rows: list[dict[str, Any]]) -> None:
    """Named by its content, in rcpo's cache folder, and read by rcpo as any data file."""
    path = kept_rows(HOLDERS[holder](rows), "pairs")
    assert path == kept_rows(rows, "pairs")
    assert path.parent == Path(os.environ["RCPO_CACHE"]) / "pairs"
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    records = load_records(DataConfig(source="file", path=str(path), eval_pairs=1))
    assert len(records.train) + len(records.held_out) == 4
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left there"


def test_values_of_numpy_and_what_is_missing() -> None:
    """pandas writes what is missing as nan, which JSON does not have."""
    frame = pd.DataFrame({"prompt": ["a", None], "chosen": ["b", "c"], "weight": [np.float32(0.5), np.nan]})
    rows = [{"n": np.int64(3), "list": np.array([1.0, np.nan]), "when": pd.Timestamp(2026, 11, 28)}]
    read = [json.loads(line) for line in kept_rows(frame, "pairs").read_text().splitlines()]
    assert read == [
        {"prompt": "a", "chosen": "b", "weight": 0.5}, {"prompt": None, "chosen": "c", "weight": None},
    ]  # fmt: skip
    assert json.loads(kept_rows(rows, "pairs").read_text()) == {
        "n": 3, "list": [1.0, None], "when": "2026-11-28 00:00:00",
    }  # fmt: skip


WRONG: dict[str, tuple[Any, str]] = {
    "path": ("x.jsonl", "pairs=x.jsonl: wants rows; for a file write data=file data.path=x.jsonl"),
    "empty": ([], "pairs: holds no row; give dicts with prompt, chosen and rejected"),
    "splits": (
        {"train": ROWS},
        "pairs: is one dict (train); give a list of dicts, or one split of a DatasetDict",
    ),
    "number": (3, "pairs: is of type int; give a list of dicts, a Dataset or a DataFrame"),
    "rows": ([ROWS[0], "b"], "pairs[1]: is of type str; give dicts with prompt, chosen and rejected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_row_is_one_line(name: str) -> None:
    rows, message = WRONG[name]
    with pytest.raises(rcpo.UserError) as caught:
        kept_rows(rows, "pairs")
    assert str(caught.value) == message
    assert not list((Path(os.environ["RCPO_CACHE"]) / "pairs").glob(".*"))


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no word": ((3,), {}, '3: is no word; write rcpo.train("objective=simpo", "calibration=on")'),
    "flag": (("--overwrite",), {}, "--overwrite: is an argument in Python; write overwrite=True"),
    "prints": (("--cfg", "job"), {}, "--cfg: prints something and trains nothing; type rcpo train"),
    "held out": ((), {"held_out": ROWS}, "held_out: are rows beside pairs=...; give those too"),
    "data": (("data=arithmetic",), {"pairs": ROWS}, "data=arithmetic: the pairs are given as rows already"),
    "path": (("+data.path=x",), {"pairs": ROWS}, "+data.path=x: the pairs are given as rows already"),
    "key": (("train.stepz=3",), {}, "train.stepz: no such key; did you mean train.steps?"),
    "grid": (("objective=dpo,simpo",), {}, "objective=dpo,simpo: is several values, and this is one run"),
    "columns": ((), {"pairs": [{"a": 1}, {"a": 2}]}, "data.path="),
    "few": (
        ("train.pairs_per_step=16",),
        {"pairs": ROWS * 9},
        "data.path= ... : no training pair is left of 36 rows beside 7 held-out pairs; give more rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_of_train_are_raised_and_write_no_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, arguments, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(rcpo.UserError) as caught:
        rcpo.train(*words, **arguments)
    begin, *rest = message.split(" ... ")
    assert str(caught.value).startswith(begin)
    assert all(part in str(caught.value) for part in rest)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
