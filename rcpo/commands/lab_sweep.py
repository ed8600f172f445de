"""Grids that `rcpo lab` trains: those of `rcpo sweep`, in a folder beside what the experiment found."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcpo.sweep.definition import Definition
    from rcpo.sweep.folder import SweepFolder

RUNS = "runs"
"""The sweep folder in the experiment's."""
FINISHED = (0, 1)
"""Exit codes of a sweep that nobody has stopped: of 1 a cell has failed, and the others are looked at."""


def look_at_grid(model: str, settings: argparse.Namespace, words: Sequence[str]) -> None:
    """Raise UserError for what a look at prompts, the user's `words` and the names of objectives and
    calibrations can tell, before torch is loaded; `checked_grid` finds all."""
    from rcpo.config.compose import compose
    from rcpo.evaluation.json_rows import json_rows
    from rcpo.launch.first_look import look_at_model
    from rcpo.sweep.definition import check_words

    check_words(words)
    if settings.prompts is not None:
        json_rows(Path(settings.prompts), f"prompts={settings.prompts}")
    firsts = settings.objectives[0], settings.calibrations[0]
    names = [(each, firsts[1]) for each in settings.objectives]
    names += [(firsts[0], each) for each in settings.calibrations[1:]]
    own = {"model.path": model, "data": "file", "data.path": "made-later.jsonl"}
    base = [f"{key}={value}" for key, value in own.items() if key not in map(key_of, words)]
    for objective, calibration in names:
        tree = compose([*base, f"objective={objective}", f"calibration={calibration}", *words])
        assert tree is not None  # words are no flags: check_words
        if not Path(model, "config.yaml").is_file():  # a run, which is refused by its own name
            look_at_model(tree)


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
