"""From a cell's words to its frozen config: composed, checked, and written into its run folder, once.

Which cells of a sweep need that is `rcpo.sweep.grow`'s. Does not run anything.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.validate import validate
from rcpo.models.commits import at_commit
from rcpo.runs.frozen import config_tree
from rcpo.sweep.definition import Definition
from rcpo.sweep.expand import Point, expand
from rcpo.sweep.folder import Cell, SweepFolder
from rcpo.sweep.target import Target


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
    return freeze_words(point.name, point.axes, words, definition.group, sweep, target)


def freeze_words(
    name: str, axes: dict[str, str], words: list[str], group: str, sweep: SweepFolder, target: Target
) -> FrozenCell:
    """The cell that these words make, the target's among them."""
    try:
        tree = compose(words)
        assert tree is not None  # words are no flags: `rcpo.sweep.definition` has checked
        # Not as words: a name or a path may hold what Hydra's grammar gives a meaning to.
        tree |= {"name": name, "run_dir": str(sweep.cells / name)}
        tracking = tree["tracking"]
        tracking["group"] = tracking.get("group") or group
        tracking["tags"] = [*tracking.get("tags", []), *(f"{key}={value}" for key, value in axes.items())]
        config = target.resolve(validate(tree))
    except UserError as error:
        raise UserError(f"cell {name}: {error}") from None
    return FrozenCell(Cell(name, axes, words, digest_of(config)), config)


def digest_of(config: ResolvedConfig) -> str:
    """Hash of a config but for its run folder, so that a sweep folder may be moved."""
    text = json.dumps(config_tree(config) | {"run_dir": None}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_cells(sweep: SweepFolder, cells: Sequence[FrozenCell]) -> None:
    """Run folders of cells that have none. Hub models are frozen to the commits that they have now."""
    for frozen in cells:
        config = at_commit(frozen.config)  # the same for all of them
        sweep.run(frozen.cell).create(config, config_tree(config), status="pending")


def description(definition: Definition) -> dict[str, Any]:
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
        "axes": shown(definition.axes)
        | {
            axis: {key: value for key, value in asdict(span).items() if value not in (None, False)}
            for axis, span in definition.ranges.items()
        },
        "exclude": definition.exclude,
        "include": include,
        "order": list(definition.order),
        "cell_name": definition.cell_name,
    } | ({} if definition.search is None else {"search": asdict(definition.search)})


def changes(sweep: SweepFolder, frozen: FrozenCell) -> Iterator[str]:
    """KEY: OLD -> NEW for each value that differs from the frozen config; a key that an older rcpo did not
    write is no change."""
    old: Any = {}
    with contextlib.suppress(OSError, yaml.YAMLError):
        old = yaml.safe_load(sweep.run(frozen.cell).config.read_text(encoding="utf-8"))
    before = dict(_leaves(old, "")) if isinstance(old, dict) else {}
    after = dict(_leaves(json.loads(json.dumps(config_tree(frozen.config))), ""))
    for key in before | after:
        if key != "run_dir" and key in before and before[key] != after.get(key):
            yield f"{key}: {before[key]} -> {after.get(key, 'absent')}"


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
