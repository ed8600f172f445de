"""Rows of metrics.jsonl and eval.jsonl: how they are written, and the one reader.

A last line without its end is being written, or was cut short by a crash: it is not there yet. Any other line
that is no row is damage: who reads the whole file is told which line, who looks at its end passes over it.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError

NON_FINITE: dict[str | None, float] = {None: math.nan, "inf": math.inf, "-inf": -math.inf}
"""How rows write what JSON has no number for; `band/lower` and `band/upper` are infinite where rho <= 0."""
TAIL_BYTES = 1 << 16
"""How much of the end of a file `read_last_rows` reads."""


def encode_row(row: dict[str, float]) -> str:
    """One line of metrics.jsonl or eval.jsonl, JSON for any reader: nan is null, the infinities "inf" and
    "-inf"."""
    names = {value: name for name, value in NON_FINITE.items() if name is not None}
    written = {key: None if math.isnan(value) else names.get(value, value) for key, value in row.items()}
    return json.dumps(written, allow_nan=False)


def decode_row(line: str | bytes) -> dict[str, Any]:
    """The row that `encode_row` wrote; ValueError for a line that is none."""
    row = json_row(line)
    try:
        return {
            key: NON_FINITE[value] if value is None or isinstance(value, str) else +value
            for key, value in row.items()
        }
    except (KeyError, TypeError):
        raise ValueError("a value is no number") from None


def json_row(line: str | bytes) -> dict[str, Any]:
    """A row as its line has it, nan as None and infinities as words; ValueError for a line that is none."""
    row: dict[str, Any] = json.loads(line)
    try:
        row["step"] += 0
    except (KeyError, TypeError):
        raise ValueError("a row without a step") from None
    return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; none where there is no file. Raises UserError for a damaged line."""
    return [_told(path, number, decode_row, line) for number, line in enumerate(_lines(path), start=1)]


def read_json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The same one by one, by `json_row`: for who turns values into numbers column by column."""
    return (_told(path, number, json_row, line) for number, line in enumerate(_lines(path), start=1))


def read_last_rows(path: Path) -> list[dict[str, Any]]:
    """The rows in the last TAIL_BYTES of a file; none where it cannot be read."""
    try:
        start = max(0, path.stat().st_size - TAIL_BYTES)
        lines, _ = _whole_lines(path, start)
    except OSError:
        return []
    return list(_undamaged(lines[1:] if start else lines))


class GrowingRows:
    """The rows of a file that another process writes, each given once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = 0

    def read_new(self) -> tuple[bool, list[dict[str, Any]]]:
        """(Whether a resumed run has dropped rows since, so that all come again; the rows not given yet)."""
        try:
            is_shorter = self._path.stat().st_size < self._end
            lines, self._end = _whole_lines(self._path, 0 if is_shorter else self._end)
        except OSError:
            return False, []
        return is_shorter, list(_undamaged(lines))


def _told(path: Path, number: int, decode: Callable[[bytes], dict[str, Any]], line: bytes) -> dict[str, Any]:
    try:
        return decode(line)
    except ValueError:
        raise UserError(f"{path}: line {number} is damaged; mend it or remove it") from None


def _undamaged(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(ValueError):
            yield decode_row(line)


def _lines(path: Path) -> list[bytes]:
    return _whole_lines(path, 0)[0] if path.is_file() else []


def _whole_lines(path: Path, start: int) -> tuple[list[bytes], int]:
    """(The lines from a byte on, where the next one begins)."""
    with path.open("rb") as stream:
        stream.seek(start)
        *lines, unfinished = stream.read().split(b"\n")
        return lines, stream.tell() - len(unfinished)
