"""metrics.jsonl and eval.jsonl as columns; those of metrics.jsonl kept beside it as parquet.

The cache knows its file by size and time of change: it is never older than what it stands for. It is
written atomically, and left out where the folder cannot be written.
"""

import contextlib
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rcpo.common.errors import UserError
from rcpo.common.files import replacing
from rcpo.runs.rows import read_json_rows

Columns = dict[str, np.ndarray]
"""Name to values, fp64, one for each row; nan where the row has none."""

STAMP = b"rcpo.source"


def read_columns(path: Path) -> Columns:
    """Every column of a file of rows. Raises UserError for a damaged line."""
    try:
        return columns_of(read_json_rows(path))
    except ValueError as error:
        raise UserError(f"{path}: {error} is not a number in some line; mend it or remove it") from None


def read_metrics(path: Path, wanted: Collection[str]) -> Columns:
    """The `wanted` columns of metrics.jsonl that are there, from the cache where that is current."""
    cache = path.with_suffix(".parquet")
    stamp = _stamp_of(path)
    columns = _read_cache(cache, stamp, wanted)
    if columns is None:
        columns = read_columns(path)
        if columns and _stamp_of(path) == stamp:  # else it grows just now
            _write_cache(cache, stamp, columns)
    return {name: values for name, values in columns.items() if name in wanted}


def columns_of(rows: Iterable[Mapping[str, Any]]) -> Columns:
    """Rows as columns. Those with the same keys are turned into columns together: most rows are alike.
    Raises ValueError with the name of a column that holds anything but numbers."""
    alike: dict[tuple[str, ...], list[int]] = {}
    values: list[tuple[Any, ...]] = []
    for place, row in enumerate(rows):
        alike.setdefault(tuple(row), []).append(place)
        values.append(tuple(row.values()))
    columns: Columns = {}
    for names, places in alike.items():
        for name, column in zip(names, zip(*(values[place] for place in places), strict=True), strict=True):
            try:  # of None, "inf" and "-inf" too
                found = np.array(column, dtype=object).astype(float)
            except (ValueError, TypeError):
                raise ValueError(name) from None
            columns.setdefault(name, np.full(len(values), math.nan))[places] = found
    return columns


def _stamp_of(path: Path) -> bytes:
    """What the cache stands for: size and time of change; empty where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return b""
    return f"{found.st_size}:{found.st_mtime_ns}".encode()


def _read_cache(cache: Path, stamp: bytes, wanted: Collection[str]) -> Columns | None:
    try:
        with pq.ParquetFile(cache) as file:
            if (file.schema_arrow.metadata or {}).get(STAMP) != stamp:
                return None
            names = [name for name in file.schema_arrow.names if name in wanted]
            table = file.read(names)
    except (OSError, pa.ArrowException):
        return None
    # By DLPack: pyarrow's own to_numpy imports pandas.
    return {name: np.from_dlpack(table[name].combine_chunks()) for name in names}


def _write_cache(cache: Path, stamp: bytes, columns: Columns) -> None:
    with contextlib.suppress(OSError), replacing(cache, by_many=True) as beside:
        pq.write_table(pa.table(columns).replace_schema_metadata({STAMP: stamp}), beside)
