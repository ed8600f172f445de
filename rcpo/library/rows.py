"""Rows that a user has in memory, as a file that a config can name: in rcpo's cache folder, by content."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError
from rcpo.common.files import cache_dir, path_beside, put_in_place, remove

HASH_LETTERS = 16


def kept_rows(rows: Any, name: str) -> Path:
    """Write rows as JSON lines to the cache folder's pairs/, unless a file of the same content is there;
    returns its path. `name` is the argument's, for errors.

    Takes an iterable of dicts, a `datasets.Dataset`, a pandas DataFrame or a pyarrow Table. Raises UserError
    for anything else, and where there is no row.
    """
    folder = cache_dir() / "pairs"
    digest = hashlib.sha256()
    num_rows = 0
    beside = path_beside(folder / "rows.jsonl", by_many=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            for row in _dicts(rows, name):
                line = (_as_json(row) + "\n").encode()
                digest.update(line)
                stream.write(line)
                num_rows += 1
        if num_rows == 0:
            raise UserError(f"{name}: holds no row; give dicts with prompt, chosen and rejected")
        path = folder / f"pairs-{digest.hexdigest()[:HASH_LETTERS]}.jsonl"
        put_in_place(beside, path)
    except OSError as error:
        raise UserError(f"{name}: {folder} cannot be written ({error.strerror}); set RCPO_CACHE") from None
    finally:
        remove(beside)
    return path


def _dicts(rows: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """The rows one by one, whatever holds them."""
    if isinstance(rows, str | Path):
        raise UserError(f"{name}={rows}: wants rows; for a file write data=file data.path={rows}")
    if isinstance(rows, Mapping):
        keys = ", ".join(map(str, list(rows)[:4]))
        raise UserError(f"{name}: is one dict ({keys}); give a list of dicts, or one split of a DatasetDict")
    if hasattr(rows, "to_pylist"):  # pyarrow
        rows = rows.to_pylist()
    elif hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas
        rows = rows.to_dict("records")
    if not isinstance(rows, Iterable):
        kind = type(rows).__name__
        raise UserError(f"{name}: is of type {kind}; give a list of dicts, a Dataset or a DataFrame")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            raise UserError(
                f"{name}[{number}]: is of type {kind}; give dicts with prompt, chosen and rejected"
            )
        yield row


def _as_json(row: Mapping[str, Any]) -> str:
    try:
        return json.dumps(row, allow_nan=False, default=_plain)
    except ValueError:  # a nan, which is how pandas writes what is missing
        return json.dumps(_without_nan(row), allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    """Numbers and lists of numpy as Python's; anything else as text."""
    if hasattr(value, "tolist"):
        return _without_nan(value.tolist())
    return dict(value) if isinstance(value, Mapping) else str(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _without_nan(value.tolist())
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value
