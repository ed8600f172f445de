"""Rows of metrics.jsonl and eval.jsonl as text: how they are written, and the one reader."""

import json
import math
from typing import Any

NON_FINITE: dict[str | None, float] = {None: math.nan, "inf": math.inf, "-inf": -math.inf}
"""How rows write what JSON has no number for; `band/lower` and `band/upper` are infinite where rho <= 0."""


def encode_row(row: dict[str, float]) -> str:
    """One line of metrics.jsonl or eval.jsonl, JSON for any reader: nan is null, the infinities "inf" and
    "-inf"."""
    names = {value: name for name, value in NON_FINITE.items() if name is not None}
    written = {key: None if math.isnan(value) else names.get(value, value) for key, value in row.items()}
    return json.dumps(written, allow_nan=False)


def decode_row(line: str) -> dict[str, Any]:
    """The row that `encode_row` wrote."""
    row = json.loads(line)
    if "step" not in row:
        raise ValueError("a row without a step")
    return {
        key: NON_FINITE[value] if value is None or isinstance(value, str) else value
        for key, value in row.items()
    }
