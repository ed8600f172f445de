"""Cells that start from another cell: `model.path=cell:NAME`, where NAME is a cell of the same sweep.

Owns what the word means: which cells come before which, and which model they all go back to. A cell that
starts from NAME trains NAME's `final/`. All that a config takes from its model, defaults among it, is read
from the model at the root of the chain, because `final/` is not there yet when cells are frozen. Runs
nothing: `rcpo.sweep.local` and `rcpo.sweep.slurm.submit` wait.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rcpo.common.errors import UserError

KEY = "model.path"
PREFIX = "cell:"
MOST_NAMED = 3


def start_of(words: Iterable[str]) -> str | None:
    """The cell that these overrides start from; of several model.path the last one counts."""
    paths = [word.split("=", 1)[1] for word in words if word.lstrip("+").split("=")[0] == KEY and "=" in word]
    return paths[-1].removeprefix(PREFIX) if paths and paths[-1].startswith(PREFIX) else None


def without_start(words: Iterable[str]) -> list[str]:
    """The overrides that Hydra is to see."""
    return [word for word in words if not word.lstrip("+").startswith(f"{KEY}={PREFIX}")]


def ancestors(name: str, words: Mapping[str, Sequence[str]]) -> list[str]:
    """The cells that the cell `name` waits for, the one that it starts from first; `words`: the overrides of
    all cells, by name. Raises UserError for a name that is no cell's, and for a circle."""
    found: list[str] = []
    start = start_of(words[name])
    while start is not None:
        last = found[-1] if found else name
        if start not in words:
            others = [other for other in words if other != last]
            close = difflib.get_close_matches(start, others, n=MOST_NAMED, cutoff=0.5)
            known = close or others[:MOST_NAMED]
            raise UserError(
                f"cell {last}: {KEY}={PREFIX}{start}: the sweep has no cell of that name; "
                f"{'the closest are' if close else 'it has'} {', '.join(known)}"
            )
        found.append(start)
        if start == name:
            shown = " starts from ".join([name, *found])
            raise UserError(
                f"cell {name}: {shown}: no cell can be the first; give one of them another {KEY}"
                + ("" if len(found) > 1 else f", or write {KEY}: [{PREFIX}{start}] under axes")
            )
        if start in found[:-1]:  # a circle further up: named where its own cells are looked at
            return ancestors(start, words)
        start = start_of(words[start])
    return found


def refuse_adapter(name: str, start: str, lora: Mapping[str, Any]) -> None:
    """Raise UserError where the cell `start`, with this model.lora, leaves no whole model in final/."""
    if lora["rank"] is not None and lora["save"] == "adapter":
        raise UserError(
            f"cell {name}: starts from {start}, which saves an adapter and no whole model; type "
            f"model.lora.save=merged for {start}"
        )
