"""From a sweep file to frozen cells: compose and check every cell, then write the sweep folder, once.

Owns the promise that what is queued does not change: cells run from SWEEP/cells/NAME/config.yaml, and a
definition that has changed since is refused, with the difference. Does not run anything.
"""

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import yaml

from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.schema import Config
from rcpo.config.validate import validate
from rcpo.models.hub import at_commit
from rcpo.runs.frozen import config_tree
from rcpo.sweep.definition import Definition
from rcpo.sweep.expand import Point, expand
from rcpo.sweep.folder import Cell, SweepFolder

NUM_DIFFERENCES_SHOWN = 5


class Target(Protocol):
    """Where cells are going to run: what that adds to their configs."""

    words: Sequence[str]
    """Overrides of every cell, after the sweep's own."""

    def resolve(self, config: Config) -> ResolvedConfig:
        """`config` without nulls, for the machines that will run it."""


class Here:
    """This machine."""

    words: Sequence[str] = ()

    def resolve(self, config: Config) -> ResolvedConfig:
        return resolve(config, None)


@dataclass(frozen=True)
class FrozenCell:
    """A cell and the config that it will run with."""

    cell: Cell
    config: ResolvedConfig


def freeze_cells(definition: Definition, sweep: SweepFolder, target: Target) -> list[FrozenCell]:
    """All cells, composed, validated and resolved; nothing is written. Raises UserError that names the
    cell."""
    return [freeze_cell(point, definition, sweep, target) for point in expand(definition)]


def freeze_cell(point: Point, definition: Definition, sweep: SweepFolder, target: Target) -> FrozenCell:
    """One cell, composed, validated and resolved."""
    words = [*point.words, *target.words]
    try:
        tree = compose(words)
        assert tree is not None  # words are no flags: `rcpo.sweep.definition` has checked
        # Not as words: a name or a path may hold what Hydra's grammar gives a meaning to.
        tree |= {"name": point.name, "run_dir": str(sweep.cells / point.name)}
        tracking = tree["tracking"]
        tracking["group"] = tracking.get("group") or definition.group
        tracking["tags"] = [
            *tracking.get("tags", []),
            *(f"{key}={value}" for key, value in point.axes.items()),
        ]
        config = target.resolve(validate(tree))
    except UserError as error:
        raise UserError(f"cell {point.name}: {error}") from None
    return FrozenCell(Cell(point.name, point.axes, words, digest_of(config)), config)


def digest_of(config: ResolvedConfig) -> str:
    """Hash of a config but for its run folder, so that a sweep folder may be moved."""
    text = json.dumps(config_tree(config) | {"run_dir": None}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_sweep(sweep: SweepFolder, definition: Definition, cells: Sequence[FrozenCell]) -> None:
    """Write the sweep folder, or make sure that the one there is of the same cells. Call with its lock held.

    manifest.jsonl comes last: a folder without it was never finished, holds nothing that has run, and is
    written again. Hub models are frozen to the commits that they have now. Raises UserError when the folder
    is something else, or of other cells.
    """
    if sweep.manifest.is_file():
        _refuse_changes(sweep, cells)
        return
    others = [path for path in sweep.path.iterdir() if path.name != sweep.lock.name]
    if others and not sweep.sweep_yaml.is_file():
        raise UserError(f"{sweep.path}: exists, is not empty and is no sweep folder; type --out FOLDER")
    write_atomically(sweep.sweep_yaml, yaml.safe_dump(_description(definition), sort_keys=False))
    for cell_folder in sweep.cells.glob("*"):
        if (cell_folder / "metrics.jsonl").exists():
            raise UserError(f"{sweep.path}: has lost its manifest.jsonl, and {cell_folder.name} has run")
    shutil.rmtree(sweep.cells, ignore_errors=True)
    for frozen in cells:
        config = at_commit(frozen.config)  # the same for all of them
        sweep.run(frozen.cell).create(config, config_tree(config), status="pending")
    write_atomically(sweep.manifest, "".join(frozen.cell.line() for frozen in cells))


def _description(definition: Definition) -> dict[str, Any]:
    """The definition as it was understood; for people, and to say what the folder is."""

    def shown(axes: dict[str, Any]) -> dict[str, Any]:
        return {
            axis: [
                value.label
                if value.words == (f"{axis}={value.label}",)
                else {"label": value.label, "overrides": list(value.words)}
                for value in values
            ]
            for axis, values in axes.items()
        }

    include = [
        shown(entry.values)
        | ({} if entry.label is None else {"label": entry.label})
        | ({"overrides": list(entry.words)} if entry.words else {})
        for entry in definition.include
    ]
    return {
        "name": definition.name,
        "group": definition.group,
        "overrides": list(definition.overrides),
        "axes": shown(definition.axes),
        "exclude": definition.exclude,
        "include": include,
        "order": list(definition.order),
        "cell_name": definition.cell_name,
    }


def _refuse_changes(sweep: SweepFolder, cells: Sequence[FrozenCell]) -> None:
    """UserError with the differences when the folder's cells are not these."""
    there = {cell.name: cell for cell in sweep.read_cells()}
    here = {frozen.cell.name: frozen for frozen in cells}
    differences = [f"{name} is new" for name in here if name not in there]
    differences += [f"{name} is gone" for name in there if name not in here]
    changes: Counter[str] = Counter()
    for name, frozen in here.items():
        if name in there and there[name].digest != frozen.cell.digest:
            changes.update(_changes(sweep, frozen))
    differences += [f"{change} in {times} cells" for change, times in changes.items()]
    if not differences:
        return
    shown = "; ".join(differences[:NUM_DIFFERENCES_SHOWN])
    more = len(differences) - NUM_DIFFERENCES_SHOWN
    raise UserError(
        f"{sweep.path}: was made from another definition ({shown}{f'; {more} more' if more > 0 else ''}); "
        f"type --out FOLDER for a new sweep, or `rcpo resume {sweep.path}` to go on with the frozen one"
    )


def _changes(sweep: SweepFolder, frozen: FrozenCell) -> Iterator[str]:
    """KEY: OLD -> NEW for each value that differs from the frozen config."""
    old: Any = {}
    with contextlib.suppress(OSError, yaml.YAMLError):
        old = yaml.safe_load(sweep.run(frozen.cell).config.read_text(encoding="utf-8"))
    before = dict(_leaves(old, "")) if isinstance(old, dict) else {}
    after = dict(_leaves(json.loads(json.dumps(config_tree(frozen.config))), ""))
    for key in before | after:
        if key != "run_dir" and before.get(key) != after.get(key):
            yield f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
