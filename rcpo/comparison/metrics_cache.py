"""metrics.jsonl and eval.jsonl as columns; those of metrics.jsonl kept beside it as parquet.

The cache knows its source by size and time of change: it is never older than what it stands for. It is
written atomically, and left out where the folder cannot be written.
"""

import json
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rcpo.common.errors import UserError

Columns = dict[str, np.ndarray]
"""Name to values, fp64, one for each row; nan where the row has none."""

SOURCE = b"rcpo.common.source"
NUMBERS = {None: math.nan, "inf": math.inf, "-inf": -math.inf}
"""As `rcpo.runs.rows.encode_row` writes what JSON has no number for."""


def read_columns(path: Path) -> Columns:
    """Every column of a file of rows; a last line cut short by a crash is left out. Empty where there is no
    file. Raises UserError for any other line that is no row."""
    if not path.is_file():
        return {}
    return _parse(path, path.read_bytes())


def read_metrics(path: Path, wanted: Collection[str]) -> Columns:
    """The `wanted` columns of metrics.jsonl that are there, from the cache where that is current."""
    if not path.is_file():
        return {}
    cache = path.with_suffix(".parquet")
    found = path.stat()
    source = f"{found.st_size}:{found.st_mtime_ns}".encode()
    cached = _read_cache(cache, source, wanted)
    if cached is not None:
        return cached
    content = path.read_bytes()
    columns = _parse(path, content)
    if columns and len(content) == found.st_size:  # else it grows just now
        _write_cache(cache, source, columns)
    return {name: values for name, values in columns.items() if name in wanted}


def _parse(path: Path, content: bytes) -> Columns:
    """Rows with the same keys are turned into columns together: most rows are alike."""
    alike: dict[tuple[str, ...], list[int]] = {}
    rows: list[tuple[Any, ...]] = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            row["step"] += 0
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: line {number} is damaged; mend it or remove it") from None
        alike.setdefault(tuple(row), []).append(len(rows))
        rows.append(tuple(row.values()))
    columns: Columns = {}
    for names, places in alike.items():
        for name, values in zip(names, zip(*(rows[place] for place in places), strict=True), strict=True):
            try:  # of None, "inf" and "-inf" too
                found = np.array(values, dtype=object).astype(float)
            except (ValueError, TypeError):
                raise UserError(
                    f"{path}: {name} is not a number in some line; mend it or remove it"
                ) from None
            columns.setdefault(name, np.full(len(rows), math.nan))[places] = found
    return columns


def as_number(value: float | str | None) -> float:
    """A value as a row of JSON writes it; KeyError for other text."""
    return NUMBERS[value] if value is None or isinstance(value, str) else float(value)


def _read_cache(cache: Path, source: bytes, wanted: Collection[str]) -> Columns | None:
    try:
        with pq.ParquetFile(cache) as file:
            if (file.schema_arrow.metadata or {}).get(SOURCE) != source:
                return None
            names = [name for name in file.schema_arrow.names if name in wanted]
            table = file.read(names)
    except (OSError, pa.ArrowException):
        return None
    # By DLPack: pyarrow's own to_numpy imports pandas.
    return {name: np.from_dlpack(table[name].combine_chunks()) for name in names}


def _write_cache(cache: Path, source: bytes, columns: Columns) -> None:
    beside = cache.with_name(f".{cache.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(pa.table(columns).replace_schema_metadata({SOURCE: source}), beside)
        os.replace(beside, cache)
    except OSError:
        beside.unlink(missing_ok=True)
