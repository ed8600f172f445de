"""`rcpo compare --with FILE`: a table of the user's own, joined to the runs by their names.

The file has a row a run: CSV or TSV with a head, a JSON list of objects, a JSON object of objects by run, or
an object a line. The column called run, name, run_name or path says which run; else the first one does.
"""

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from rcpo.common.console import number
from rcpo.common.errors import UserError
from rcpo.comparison.groups import Group
from rcpo.comparison.load import ComparedRun, one_line

NAMES = ("run", "name", "run_name", "path")


@dataclass(frozen=True)
class Joined:
    """Values of the file by run."""

    names: list[str]
    """Its columns, but for the one that names the run."""
    rows: dict[str, dict[str, Any]]
    """By the last part of the name that the file gives."""

    def text(self, name: str, group: Group) -> str:
        """The mean over the group's runs, or what they all say; a dash where the file has none of them."""
        value = self.value(name, group)
        return "-" if value is None else number(value) if isinstance(value, float) else one_line(value)

    def value(self, name: str, group: Group) -> float | str | None:
        found = [
            row[name] for run in group.runs if name in (row := self.row_of(run)) and row[name] is not None
        ]
        numbers = [each for item in found if (each := _as_number(item)) is not None]
        if numbers and len(numbers) == len(found):
            return sum(numbers) / len(numbers)
        said = list(dict.fromkeys(str(item) for item in found))
        return " ".join(said) if said else None

    def row_of(self, run: ComparedRun) -> dict[str, Any]:
        """By its folder's name, else by the name in its config."""
        for name in (run.path.name, run.settings.get("name")):
            if name in self.rows:
                return self.rows[name]
        return {}


def read_joined(path: Path, runs: Iterable[ComparedRun], taken: Iterable[str]) -> Joined:
    """Raises UserError for a file that cannot be read, names no run of these, or has a column of `taken`."""
    rows = _read_rows(path)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    by = next((name for name in NAMES if name in columns), columns[0])
    table = {
        PurePath(str(row[by])).name: {key: value for key, value in row.items() if key != by}
        for row in rows
        if row.get(by) not in (None, "")
    }
    names = [name for name in columns if name != by]
    for name in names:
        if name in set(taken):
            raise UserError(f"--with {path}: {name}: is a column of the table already; give it another name")
    joined = Joined(names, table)
    known = [run.path.name for run in runs if joined.row_of(run)]
    if not known:
        some = ", ".join(list(table)[:3])
        raise UserError(f"--with {path}: its column {by} names none of the runs (it has {some}); give names "
                        "of run folders")  # fmt: skip
    return joined


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(f"--with {path}: {said}; give a .csv, .tsv, .json or .jsonl file") from None
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            lines = text.splitlines()
            rows: Any = [
                {key: value for key, value in row.items() if key is not None}
                for row in csv.DictReader(lines, delimiter="," if kind == ".csv" else "\t")
            ]
        elif kind == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif kind == ".json":
            rows = json.loads(text)
        else:
            raise UserError(f"--with {path}: must be a .csv, .tsv, .json or .jsonl file")
    except (ValueError, csv.Error) as error:
        raise UserError(f"--with {path}: cannot be read ({one_line(error)[:120]}); mend the file") from None
    if isinstance(rows, dict):
        rows = [{"run": name} | row for name, row in rows.items() if isinstance(row, dict)]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and row for row in rows):
        raise UserError(f"--with {path}: has no rows; give one a run, with keys or a head")
    return rows


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return float(value)
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
