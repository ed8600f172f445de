"""From what a user typed to run folders: runs, sweeps, folders of runs, globs."""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rcpo.common.errors import UserError


def find_runs(words: Sequence[str]) -> list[Path]:
    """Run folders of all words, each once, in the order of the words and by name within one.

    Raises UserError for a word that names no run.
    """
    found: dict[Path, Path] = {}
    for word in words:
        is_pattern = glob.has_magic(word) and not Path(word).exists()
        paths = [Path(match) for match in sorted(glob.glob(word))] if is_pattern else [Path(word)]
        runs = [run for path in paths for run in _runs_at(path)]
        if not runs:
            there = "matches nothing" if not paths else "is not there"
            if any(path.exists() for path in paths):
                there = "holds no run folder (one with config.yaml)"
            raise UserError(f"{word}: {there}; give run folders, a sweep folder, or a pattern in quotes")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _runs_at(path: Path) -> Iterator[Path]:
    """`path` itself, or the cells of a sweep, or the runs that lie directly in a folder."""
    if is_run(path):
        yield path
        return
    inside = path / "cells" if (path / "cells").is_dir() else path
    if inside.is_dir():
        places = _places_in_manifest(path / "manifest.jsonl")
        found = [entry for entry in inside.iterdir() if is_run(entry)]
        yield from sorted(found, key=lambda entry: (places.get(entry.name, len(places)), entry.name))


def _places_in_manifest(path: Path) -> dict[str, int]:
    """A sweep's order of its cells, by name; empty where there is no manifest that can be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {json.loads(line)["name"]: place for place, line in enumerate(lines)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
