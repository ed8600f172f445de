"""Rows of a .json or .jsonl file, as they are: prompts, and answers to them. Loads nothing heavy."""

import json
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError, shortened


def json_rows(path: Path, shown: str) -> list[Any]:
    """A list in a .json file, or a row a line. Raises UserError, which begins with `shown`, where the file
    cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(f"{shown}: {said}; give a .json or .jsonl file") from None
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{shown}: is not JSON ({shortened(str(error))}); mend it") from None
        if not isinstance(found, list):
            raise UserError(f"{shown}: must be a list of rows; save one row a line as .jsonl")
        return found
    rows = []
    for number, line in enumerate(text.split("\n")):  # JSON strings may hold U+2028 and its like
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            raise UserError(f"{shown}: line {number + 1} is not JSON; mend it") from None
    return rows
