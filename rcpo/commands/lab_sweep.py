"""Grids that `rcpo lab` trains: those of `rcpo sweep`, in a folder that holds what the experiment found too."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcpo.sweep.folder import SweepFolder

RUNS = "runs"
"""The sweep folder in the experiment's."""


def run_cells(
    name: str, axes: dict[str, Any], settings: argparse.Namespace, own: dict[str, str], words: Sequence[str]
) -> "tuple[int, SweepFolder]":
    """Train every cell that is not done yet; returns the exit code of `rcpo sweep`, and the folder. `own` are
    the experiment's words by their keys, of which the user's `words` replace those of the same key."""
    from rcpo.commands.sweep import run_grid
    from rcpo.sweep.definition import check_words, definition_of
    from rcpo.sweep.folder import SweepFolder

    check_words(words)
    given = {word.lstrip("+~").split("=")[0] for word in words}
    base = [f"{key}={value}" for key, value in own.items() if key not in given]
    tree = {"name": name, "overrides": base, "axes": axes, "seeds": list(settings.seeds)}
    grid = argparse.Namespace(
        out=str(settings.out / RUNS), parallel=settings.parallel, dry_run=False, pairs_per_second=None, slurm=None,
        max_parallel=None, print=False,
    )  # fmt: skip
    code = run_grid(definition_of(tree, name, list(words)), grid)
    return code, SweepFolder(settings.out / RUNS)
