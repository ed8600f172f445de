"""Files to rows, by the end of their name: JSON, JSON lines, CSV, TSV and parquet. Owns the one-line errors
about them; does not know splits (`rcpo.records.readers`)."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcpo.common.errors import first_line
from rcpo.records.places import SUFFIXES, Place

_LARGEST_CSV_FIELD = 2**31 - 1
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class Part:
    """Rows of one file or one split."""

    name: str
    columns: list[str]
    """Names of all columns, in order of appearance."""
    num_rows: int
    take: Callable[[range], list[dict[str, Any]]]
    """These rows, a dict each; may hold the wanted columns only."""
    notes: tuple[str, ...] = ()
    """How it was read, where that could be doubted."""


def listed(name: str, columns: list[str], rows: list[dict[str, Any]], notes: tuple[str, ...] = ()) -> Part:
    """A part whose rows are in memory."""
    return Part(name, columns, len(rows), lambda chosen: rows[chosen.start : chosen.stop], notes)


def read_file(path: Path, place: Place, wanted: set[str]) -> Part:
    """All rows of a file. Raises UserError with one line."""
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
    if kind in (".csv", ".tsv"):
        return _parse_csv(text, place, "," if kind == ".csv" else "\t")
    rows = list(_parse_json_lines(text, place) if kind == ".jsonl" else _parse_json(text, place))
    return listed(place.shown, list(dict.fromkeys(key for row in rows for key in row)), rows)


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
        raise place.error(f"is JSON that cannot be read ({first_line(error)}); write it anew") from None
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
                f"line {number} is JSON that cannot be read ({first_line(error)}); mend that line"
            ) from None
        if not isinstance(row, dict):
            raise place.error(f"line {number} is not an object; every line must be one object")
        yield row


def _parse_csv(text: str, place: Place, usual: str) -> Part:
    """Rows of text; a cell that holds a JSON list of messages becomes that list. Cells are separated as
    `usual`, or, where the header has none of that, by what it has."""
    csv.field_size_limit(_LARGEST_CSV_FIELD)
    separator, notes = _separator(text, usual), list[str]()
    if separator != usual:
        said = _SEPARATORS
        notes.append(f"its header has no {said[usual]}: cells are separated by {said[separator]}")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    rows = []
    try:
        for row in reader:
            if None in row:
                raise place.error(
                    f"line {reader.line_num} has more cells than the header; "
                    f"quote cells with {_SEPARATORS[separator]}"
                )
            rows.append({name: _csv_value(cell) for name, cell in row.items()})
    except csv.Error as error:
        # The count stands at the last whole row: the line where the faulty one begins is the next.
        line = reader.line_num + 1
        raise place.error(f"line {line} is not CSV ({error}); mend that line") from None
    return listed(place.shown, list(reader.fieldnames or []), rows, tuple(notes))


def _separator(text: str, usual: str) -> str:
    header = re.sub(r'"[^"]*"', "", text.lstrip("\n").split("\n", 1)[0])
    if usual in header:
        return usual
    return max(_SEPARATORS, key=lambda sign: (header.count(sign), sign == usual))


def _csv_value(cell: str | None) -> Any:
    if cell is None or not re.match(r"\s*\[\s*\{", cell):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _read_parquet(path: Path, place: Place, wanted: set[str]) -> Part:
    import pyarrow
    from pyarrow import parquet

    try:
        columns = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in columns if name in wanted])
    except (pyarrow.ArrowException, OSError) as error:
        raise place.error(f"is not a parquet file ({first_line(error)}); write it again") from None

    def take(chosen: range) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = table.slice(chosen.start, len(chosen)).to_pylist()
        return rows

    return Part(place.shown, columns, table.num_rows, take)
