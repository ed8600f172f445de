"""Grids that `rcpo lab` trains: those of `rcpo sweep`, in a folder beside what the experiment found."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcpo.sweep.definition import Definition
    from rcpo.sweep.folder import SweepFolder

RUNS = "runs"
"""The sweep folder in the experiment's."""
FINISHED = (0, 1)
"""Exit codes of a sweep that nobody has stopped: of 1 a cell has failed, and the others are looked at."""


def checked_grid(
    name: str, axes: dict[str, Any], settings: argparse.Namespace, own: dict[str, str], words: Sequence[str]
) -> "Definition":
    """The grid of an experiment, every cell composed and validated; nothing is written, and its data need not
    be there yet. `own` are the experiment's words by their keys, of which the user's `words` replace those of
    the same key. Raises UserError."""
    from rcpo.sweep.definition import check_words, definition_of
    from rcpo.sweep.folder import SweepFolder
    from rcpo.sweep.freeze import freeze_cells
    from rcpo.sweep.target import Here

    check_words(words)
    given = {key_of(word) for word in words}
    base = [f"{key}={value}" for key, value in own.items() if key not in given]
    tree = {"name": name, "overrides": base, "axes": axes, "seeds": list(settings.seeds)}
    definition = definition_of(tree, name, list(words))
    freeze_cells(definition, SweepFolder(settings.out / RUNS), Here())
    return definition


def key_of(word: str) -> str:
    """What a word of `rcpo train` sets."""
    return word.lstrip("+~").split("=")[0]


def run_cells(definition: "Definition", settings: argparse.Namespace) -> "tuple[int, SweepFolder]":
    """Train every cell that is not done yet; returns the exit code of `rcpo sweep`, and the folder."""
    from rcpo.commands.sweep import run_grid
    from rcpo.sweep.folder import SweepFolder

    grid = argparse.Namespace(
        out=str(settings.out / RUNS), parallel=settings.parallel, dry_run=False, pairs_per_second=None,
        slurm=None, max_parallel=None, print=False,
    )  # fmt: skip
    return run_grid(definition, grid), SweepFolder(settings.out / RUNS)
