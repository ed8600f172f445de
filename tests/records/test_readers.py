"""Files, `datasets` folders and hub ids to rows, each format against the same rows; faults in one exact
line."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from rcpo.common.errors import UserError
from rcpo.records.places import Place
from rcpo.records.readers import read_rows

COLUMNS = {"prompt", "chosen", "rejected"}
TEXT_ROWS = [
    {"prompt": "Wie heißt, du?", "chosen": 'Ich "Ada"\u2028und\nmehr', "rejected": "x"},
    {"prompt": "second", "chosen": "a", "rejected": "b"},
]
MESSAGE_ROWS = [
    {
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for number in range(3)
]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` converts folders of files into its cache, which is read from the environment at import."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """With a blank line between rows, and U+2028 as it is."""
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


def write_json_lines_gz(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_csv(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> None:
    """Messages as JSON cells; with the byte order mark that spreadsheets write."""
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=separator)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
            )


def write_csv_gz(path: Path, rows: list[dict[str, Any]]) -> None:
    write_csv(path, rows)
    path.write_bytes(gzip.compress(path.read_bytes()))


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    write_csv(path, rows, "\t")


def write_tsv_gz(path: Path, rows: list[dict[str, Any]]) -> None:
    write_tsv(path, rows)
    path.write_bytes(gzip.compress(path.read_bytes()))


def write_semicolons(path: Path, rows: list[dict[str, Any]]) -> None:
    """As spreadsheets write CSV where the comma is the decimal sign."""
    write_csv(path, rows, ";")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_dataset(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(path)


def write_dataset_dict(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets.DatasetDict(
        {"test": datasets.Dataset.from_list(rows[:1]), "train": datasets.Dataset.from_list(rows)}
    ).save_to_disk(path)


def write_hub_layout(path: Path, rows: list[dict[str, Any]]) -> None:
    """A folder of data files, as a clone of a hub data set."""
    path.mkdir()
    write_json_lines_gz(path / "train.jsonl.gz", rows)
    write_json_lines_gz(path / "test.jsonl.gz", rows[:1])


FORMATS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "pairs.json": write_json,
    "pairs.jsonl": write_json_lines,
    "PAIRS.JSONL.GZ": write_json_lines_gz,
    "lines-all-the-same.json": write_json_lines,
    "pairs.csv": write_csv,
    "pairs.csv.gz": write_csv_gz,
    "pairs.tsv": write_tsv,
    "pairs.tsv.gz": write_tsv_gz,
    "semicolons.csv": write_semicolons,
    "tabs.csv": write_tsv,
    "commas.tsv": write_csv,
    "pairs.csv.jsonl": write_json_lines,
    "pairs.parquet": write_parquet,
    "saved": write_dataset,
    "saved-dict": write_dataset_dict,
    "hub": write_hub_layout,
}


@pytest.mark.parametrize("rows", [TEXT_ROWS, MESSAGE_ROWS], ids=["text", "messages"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    FORMATS[name](tmp_path / name, rows)
    read = read_rows(Place(str(tmp_path / name), None), COLUMNS)
    assert read.columns == ["prompt", "chosen", "rejected"]
    assert read.rows == rows


@pytest.mark.parametrize("name", ["pairs.parquet", "saved"])
def test_formats_with_columns_read_the_wanted_ones_only(tmp_path: Path, name: str) -> None:
    rows = [{**row, "score_chosen": 3.5} for row in TEXT_ROWS]
    FORMATS[name](tmp_path / name, rows)
    read = read_rows(Place(str(tmp_path / name), None), COLUMNS)
    assert read.columns == ["prompt", "chosen", "rejected", "score_chosen"]
    assert read.rows == TEXT_ROWS


def test_a_cell_that_only_looks_like_messages_stays_text(tmp_path: Path) -> None:
    row = {"prompt": "[{x", "chosen": "[1, 2]", "rejected": "{}"}
    write_csv(tmp_path / "a.csv", [row])
    assert read_rows(Place(str(tmp_path / "a.csv"), None), COLUMNS).rows == [row]


def test_columns_are_those_of_any_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"chosen": "x"}\n{"rejected": "y", "chosen": "z"}\n')
    assert read_rows(Place(str(tmp_path / "a.jsonl"), None), COLUMNS).columns == ["chosen", "rejected"]


@pytest.mark.parametrize("name", ["saved-dict", "hub"])
def test_a_split_is_the_one_that_is_named(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name, TEXT_ROWS)
    assert read_rows(Place(str(tmp_path / name), "test"), COLUMNS).rows == TEXT_ROWS[:1]
    assert read_rows(Place(str(tmp_path / name), "train"), COLUMNS).rows == TEXT_ROWS


def test_a_home_directory_is_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_json(tmp_path / "a.json", TEXT_ROWS)
    assert read_rows(Place("~/a.json", None), COLUMNS).rows == TEXT_ROWS


def fault(place: Place) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(place, COLUMNS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


EMPTY = "is empty; give a file with one pair a row"
NO_ROWS = "holds no rows; give a file with one pair a row"
FAULTY: dict[str, tuple[str, bytes, str]] = {
    "nothing": ("a.jsonl", b"", EMPTY),
    "nothing in gzip": ("a.jsonl.gz", gzip.compress(b""), EMPTY),
    "blank lines": ("a.jsonl", b"\n \n", EMPTY),
    "an empty list": ("a.json", b"[]", NO_ROWS),
    "a header alone": ("a.csv", b"prompt,chosen,rejected\n", NO_ROWS),
    "line 2 is not JSON": (
        "a.jsonl",
        b'{"chosen": "a"}\n{"chosen": a}\n',
        "line 2 is not JSON (Expecting value); every line must be one object",
    ),
    "line 3 of a list is not JSON": (
        "a.json",
        b'[\n{"chosen": "a"},\n{"chosen" "b"}\n]',
        "line 3 is not JSON (Expecting ':' delimiter); mend that line",
    ),
    "line 2 of lines in .json": (
        "a.json",
        b'{"chosen": "a"}\n{"chosen": "b"\n',
        "line 2 is not JSON (Expecting ',' delimiter); every line must be one object",
    ),
    "a list a line": ("a.jsonl", b'["a", "b"]\n', "line 1 is not an object; every line must be one object"),
    "one object": (
        "a.json",
        b'{"data": []}',
        "must hold a list of objects, or one object a line; write it so",
    ),
    "a list of text": (
        "a.json",
        b'["a"]',
        "must hold a list of objects, or one object a line; write it so",
    ),
    "Latin-1": (
        "a.jsonl",
        '{"chosen": "é"}'.encode("latin-1"),
        "is not UTF-8 text (byte 12); save it as UTF-8",
    ),
    "not gzip": (
        "a.jsonl.gz",
        b"{}",
        "is not a whole gzip file (Not a gzipped file (b'{}')); copy it again",
    ),
    "half a gzip file": (
        "a.jsonl.gz",
        gzip.compress(b'{"chosen": "a"}')[:-6],
        "is not a whole gzip file (Compressed file ended before the end-of-stream marker was reached); "
        "copy it again",
    ),
    "a comma too many": (
        "a.csv",
        b"chosen,rejected\na,b\na,b,c\n",
        "line 3 has more cells than the header; quote cells with commas",
    ),
    "an open quote": (
        "a.csv",
        b'chosen,rejected\na,"b\nc,d\n',
        "line 2 is not CSV (unexpected end of data); mend that line",
    ),
    "another suffix": (
        "a.txt",
        b"x",
        "is a file of no known kind; its name must end in .json, .jsonl, .json.gz, .jsonl.gz, .csv, .csv.gz, "
        ".tsv, .tsv.gz, .parquet",
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_faulty_files_are_one_exact_line(tmp_path: Path, case: str) -> None:
    name, content, expected = FAULTY[case]
    path = tmp_path / name
    path.write_bytes(content)
    assert fault(Place(str(path), None)) == f"data.path={path}: {expected}"


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    said = fault(Place(str(tmp_path / "a.parquet"), None))
    assert said.startswith(f"data.path={tmp_path}/a.parquet: is not a parquet file (")
    assert said.endswith("); write it again")


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "some/missing.parquet", "../folder", "/no/such/folder", "x"]
)
def test_missing_places_are_not_sought_on_the_hub(path: str) -> None:
    assert fault(Place(path, None)) == (
        f"data.path={path}: no such file or folder; give a file (.json, .jsonl, .json.gz, .jsonl.gz, .csv, "
        ".csv.gz, .tsv, .tsv.gz, .parquet), a folder or a hub id"
    )


def test_a_hub_id_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    said = fault(Place("nobody/no-such-pairs", None))
    assert said.startswith(
        "data.path=nobody/no-such-pairs: is not on this machine, and the hub cannot be reached ("
    )
    assert said.endswith(" where there is a network and bring FOLDER here; then data.path=FOLDER")


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert fault(Place(str(tmp_path), None)).startswith(f"data.path={tmp_path}: is a folder without data; ")


def test_a_broken_saved_data_set(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    assert fault(Place(str(tmp_path), None)).startswith(
        f"data.path={tmp_path}: cannot be loaded by `datasets`: "
    )


def test_a_folder_that_is_no_data_set_names_its_file(tmp_path: Path) -> None:
    """Pairs beside a run's files: what `data.path=.` finds on the second day."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/run.json").write_text("{")
    said = fault(Place(str(tmp_path), None))
    assert said.endswith(f"; mend the folder, or type data.path={tmp_path}/pairs.jsonl, a file in it")


def test_unknown_splits_name_those_there_are(tmp_path: Path) -> None:
    folder, file = str(tmp_path / "saved-dict"), str(tmp_path / "a.json")
    write_dataset_dict(Path(folder), TEXT_ROWS)
    write_json(Path(file), TEXT_ROWS)
    assert fault(Place(folder, "dev")) == (
        f"data.split=dev: {folder} has no such split, only test, train; type data.split=test"
    )
    assert fault(Place(file, "test", split_key="data.eval_split")) == (
        f"data.eval_split=test: {file} has no such split, only train; type data.eval_split=train or "
        "data.eval_split=null to draw held-out pairs from the training pairs"
    )


def test_a_split_is_asked_for_where_none_is_the_obvious_one(tmp_path: Path) -> None:
    """Of test and dev neither is; nor is train, where pairs are to be held out."""
    rows = datasets.Dataset.from_list(TEXT_ROWS)
    folder = str(tmp_path / "ds")
    datasets.DatasetDict({"dev": rows, "test": rows}).save_to_disk(folder)
    assert fault(Place(folder, None)) == (
        f"data.split: has no value and {folder} has the splits dev, test; type data.split=dev"
    )
    both = str(tmp_path / "both")
    write_dataset_dict(Path(both), TEXT_ROWS)
    assert fault(Place(both, None, "data.eval_path", "data.eval_split")) == (
        f"data.eval_split: has no value and {both} has the splits test, train; type data.eval_split=test"
    )
