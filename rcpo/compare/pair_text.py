"""The words of held-out pairs, read again from a run's data, and the pairs whose winner fell most.

Per-pair results hold numbers alone, in the order of the held-out set. Where the data is not there any more,
or gives another number of pairs, the pairs keep their numbers and have no words.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rcpo.compare.cells import Cell
from rcpo.compare.load import Run
from rcpo.errors import UserError

NUM_PAIRS = 10


@dataclass(frozen=True)
class PairText:
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class FallenPair:
    """`index` in the held-out set; change of chosen by calibration, mean over seeds."""

    index: int
    text: PairText | None
    changes: dict[str, float]


def most_fallen(cells: list[Cell], texts: list[PairText] | str) -> list[FallenPair]:
    """The ten pairs whose winner fell most under the first of `cells`, and what became of them in the
    others that were measured on the same pairs."""
    means = {
        cell.calibration: np.mean([run.pairs.r_w for run in cell.runs if run.pairs is not None], 0)
        for cell in cells
        if any(run.pairs is not None for run in cell.runs)
    }
    if not means:
        return []
    first = next(iter(means.values()))
    means = {name: values for name, values in means.items() if len(values) == len(first)}
    return [
        FallenPair(
            int(idx),
            texts[idx] if isinstance(texts, list) and len(texts) == len(first) else None,
            {name: float(values[idx]) for name, values in means.items()},
        )
        for idx in np.argsort(first)[:NUM_PAIRS]
        if first[idx] < 0
    ]


def held_out_texts(run: Run) -> list[PairText] | str:
    """Of the run's held-out pairs in their order, or in words why there are none."""
    # Reading data needs the whole config machinery, and with it torch.
    from pydantic import TypeAdapter, ValidationError

    from rcpo.config.schema import DataConfig
    from rcpo.data.load import load_records

    tree = _tree_of(run, "data.")
    known = DataConfig.__dataclass_fields__
    # Filters and weights are of training pairs alone.
    tree = {key: value for key, value in tree.items() if key in known and key != "filter"}
    columns = tree.get("columns")
    if isinstance(columns, dict):
        tree["columns"] = {
            part: name for part, name in columns.items() if part in ("prompt", "chosen", "rejected")
        }
    try:
        records = load_records(TypeAdapter(DataConfig).validate_python(DataConfig(**tree))).held_out
    except UserError as error:
        return str(error)
    except (ValidationError, OSError, ValueError, TypeError, ImportError) as error:
        return f"the data cannot be read: {' '.join(str(error).split())[:200]}"
    if run.pairs is None or len(records) != len(run.pairs.r_w):
        return "the data now gives another number of held-out pairs than the run measured"
    return [
        PairText(as_text(record.prompt), as_text(record.chosen), as_text(record.rejected))
        for record in records
    ]


def as_text(part: str | list[dict[str, str]]) -> str:
    """Messages as ROLE: CONTENT; a single one as its content."""
    if isinstance(part, str):
        return part.strip()
    if len(part) == 1:
        return part[0]["content"].strip()
    return "\n".join(f"{message['role']}: {message['content'].strip()}" for message in part)


def _tree_of(run: Run, prefix: str) -> dict[str, Any]:
    """The flat settings below `prefix` as nested dicts."""
    tree: dict[str, Any] = {}
    for key, value in run.settings.items():
        if key.startswith(prefix):
            *sections, last = key.removeprefix(prefix).split(".")
            inside = tree
            for section in sections:
                inside = inside.setdefault(section, {})
            inside[last] = value
    return tree
