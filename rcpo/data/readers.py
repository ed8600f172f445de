"""Rows from wherever pairs lie: JSON, JSON lines, CSV, parquet, `datasets` folders and hub ids.

Owns file formats and splits, and the one-line errors about them. Does not know what a row means:
`rcpo.data.load` calls `read_rows` and gives the rows to `rcpo.data.records`. The `datasets` library takes
seconds to import, so plain files are read without it.
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError, shortened

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
_LARGEST_CSV_FIELD = 2**31 - 1
MOST_FILES = 100_000
"""In a data folder; one with more is something else, such as a home folder."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Place:
    """Where rows are, and the config keys that say so, for errors."""

    path: str
    split: str | None
    path_key: str = "data.path"
    split_key: str = "data.split"

    def error(self, fault: str) -> UserError:
        return UserError(f"{self.path_key}={self.path}: {fault}")

    def __str__(self) -> str:
        return self.path if self.split is None else f"{self.path} [{self.split}]"


@dataclass(frozen=True)
class Rows:
    columns: list[str]
    """Names of all columns, in order of appearance."""
    rows: list[dict[str, Any]]
    """One dict per row, at least one row; may hold the wanted columns only."""


def read_rows(place: Place, wanted: set[str]) -> Rows:
    """Read all rows of a file, of a folder's split or of a hub data set's split.

    `wanted` names the columns that will be looked at: formats with columns skip the others.
    Raises UserError with one line where there is no such place or split, or where it does not hold rows.
    """
    if not place.path:
        raise place.error("is empty; give a file, a folder or a hub id")
    try:
        path = Path(place.path).expanduser()
        is_there = path.exists()
    except (RuntimeError, OSError) as error:  # ~somebody who does not exist; a name too long; no permission
        raise UserError(f"{place.path_key}={shortened(place.path)}: is no path ({error}); give one") from None
    if is_there and path.is_file():
        if place.split not in (None, "train"):
            raise _unknown_split(place, ["train"])
        rows = _read_file(path, place, wanted)
    elif is_there and path.is_dir():
        rows = _read_folder(path, place, wanted)
    else:
        rows = _read_hub(place, wanted)
    if not rows.rows:
        raise place.error("holds no rows; give a file with one pair a row")
    return rows


def _unknown_split(place: Place, known: list[str]) -> UserError:
    names = ", ".join(known)
    advice = f"{place.split_key}={known[0]}"
    if place.split is None:
        return UserError(
            f"{place.split_key}: has no value and {place.path} has the splits {names}; type {advice}"
        )
    if place.split_key == "data.eval_split":
        advice += " or data.eval_split=null to draw held-out pairs from the training pairs"
    return UserError(
        f"{place.split_key}={place.split}: {place.path} has no such split, only {names}; type {advice}"
    )


# Files


def _read_file(path: Path, place: Place, wanted: set[str]) -> Rows:
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise place.error(f"is a file of no known kind; its name must end in {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise place.error("is empty; give a file with one pair a row")
    if name.endswith(".parquet"):
        return _read_parquet(path, place, wanted)
    try:
        with (gzip.open if name.endswith(".gz") else open)(path, "rb") as stream:
            text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise place.error(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise place.error(f"is not a whole gzip file ({error}); copy it again") from None
    except OSError as error:
        raise place.error(f"cannot be read: {error.strerror}; give a file that can be") from None
    if not text.strip():
        raise place.error("is empty; give a file with one pair a row")
    kind = Path(name.removesuffix(".gz")).suffix
    if kind == ".csv":
        return _parse_csv(text, place)
    rows = list(_parse_json_lines(text, place) if kind == ".jsonl" else _parse_json(text, place))
    return Rows(list(dict.fromkeys(key for row in rows for key in row)), rows)


def _parse_json(text: str, place: Place) -> list[dict[str, Any]]:
    """A list of objects, or one object a line."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        # A second value after the first is how JSON lines look to the JSON parser.
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return list(_parse_json_lines(text, place))
        raise place.error(f"line {error.lineno} is not JSON ({error.msg}); mend that line") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
        raise place.error(f"is JSON that cannot be read ({_first_line(error)}); write it anew") from None
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise place.error("must hold a list of objects, or one object a line; write it so")
    return data


def _parse_json_lines(text: str, place: Place) -> Iterator[dict[str, Any]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise place.error(
                f"line {number} is not JSON ({error.msg}); every line must be one object"
            ) from None
        except (ValueError, RecursionError) as error:
            raise place.error(
                f"line {number} is JSON that cannot be read ({_first_line(error)}); mend that line"
            ) from None
        if not isinstance(row, dict):
            raise place.error(f"line {number} is not an object; every line must be one object")
        yield row


def _parse_csv(text: str, place: Place) -> Rows:
    """Rows of text; a cell that holds a JSON list of messages becomes that list."""
    csv.field_size_limit(_LARGEST_CSV_FIELD)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row:
                raise place.error(
                    f"line {reader.line_num} has more cells than the header; quote cells with commas"
                )
            rows.append({name: _csv_value(cell) for name, cell in row.items()})
    except csv.Error as error:
        # The count stands at the last whole row: the line where the faulty one begins is the next.
        line = reader.line_num + 1
        raise place.error(f"line {line} is not CSV ({error}); mend that line") from None
    return Rows(list(reader.fieldnames or []), rows)


def _csv_value(cell: str | None) -> Any:
    if cell is None or not re.match(r"\s*\[\s*\{", cell):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _read_parquet(path: Path, place: Place, wanted: set[str]) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        columns = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in columns if name in wanted])
    except (pyarrow.ArrowException, OSError) as error:
        raise place.error(f"is not a parquet file ({_first_line(error)}); write it again") from None
    return Rows(columns, table.to_pylist())


# `datasets`


def _read_folder(path: Path, place: Place, wanted: set[str]) -> Rows:
    """What `save_to_disk` wrote, or a folder of data files laid out as on the hub."""
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    files = [] if saved else list(itertools.islice(path.rglob("*"), MOST_FILES + 1))
    if len(files) > MOST_FILES:
        raise place.error(f"holds more than {MOST_FILES} files; give the folder of the data alone")
    if not saved and not any(file.name.lower().endswith(SUFFIXES) for file in files):
        raise place.error(f"is a folder without data; it must hold {', '.join(SUFFIXES)} or a saved data set")
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(str(path))
    # The library raises nearly any class for a broken folder.
    except Exception as error:
        raise place.error(f"cannot be loaded by `datasets`: {_first_line(error)}; mend the folder") from error
    finally:
        datasets.enable_progress_bars()
    return _rows_of_split(loaded, place, wanted)


def _read_hub(place: Place, wanted: set[str]) -> Rows:
    return _rows_of_split(_load_hub(place), place, wanted)


def _load_hub(place: Place) -> Any:
    if not _HUB_ID.fullmatch(place.path) or place.path.startswith(".") or place.path.endswith(SUFFIXES):
        raise place.error(
            f"no such file or folder; give a file ({', '.join(SUFFIXES)}), a folder or a hub id"
        )
    import datasets

    try:
        return datasets.load_dataset(place.path)
    # No network, no such data set, no access: the hub's clients raise nearly any class.
    except Exception as error:
        raise place.error(
            f"is no file or folder here, and not to be had from the hub: {_first_line(error)}; "
            f"type {place.path_key}=FOLDER to use a copy on disk"
        ) from error


def hub_fingerprint(path: str) -> str:
    """Of a hub data set as `datasets` has it: its fingerprints of the splits, which contain the commit.
    Raises UserError where it cannot be had."""
    loaded = _load_hub(Place(path, None))
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return json.dumps({str(name): splits[name]._fingerprint for name in sorted(splits, key=str)})


def _rows_of_split(loaded: Any, place: Place, wanted: set[str]) -> Rows:
    """Rows of the split that `place` names; where it names none, of the only one, or, to train on, of
    `train`."""
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    known = list(splits)
    split = place.split
    if split is None:
        is_default = "train" in splits and place.split_key == "data.split"
        split = known[0] if len(known) == 1 else "train" if is_default else None
    if split not in splits:
        raise _unknown_split(place, known)
    dataset = splits[split]
    columns = dataset.column_names
    return Rows(columns, dataset.select_columns([name for name in columns if name in wanted]).to_list())


def _first_line(error: BaseException) -> str:
    """First line of what a library says, short enough for one line."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:200] for line in lines if line), type(error).__name__)
