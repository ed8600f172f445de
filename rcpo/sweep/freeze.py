"""From a cell's words to its frozen config: composed, checked, and written into its run folder, once.

Which cells of a sweep need that is `rcpo.sweep.grow`'s. Does not run anything.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.validate import validate
from rcpo.models.commits import at_commit
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree
from rcpo.sweep.definition import Definition
from rcpo.sweep.expand import Point, expand
from rcpo.sweep.folder import Cell, SweepFolder
from rcpo.sweep.start import ancestors, refuse_adapter, without_start
from rcpo.sweep.target import Target


@dataclass(frozen=True)
class FrozenCell:
    """A cell and the config that it will run with."""

    cell: Cell
    config: ResolvedConfig
    root: ResolvedConfig
    """The same with the model that all starts from, which is there before anything has run."""


@dataclass(frozen=True)
class Start:
    """What a cell starts from that starts from another cell."""

    after: tuple[str, ...] = ()
    """The cells before it, the next one first; empty: none."""
    root: str | None = None
    """model.path of the first of them."""


def read_start(name: str, words: Mapping[str, Sequence[str]]) -> Start:
    """What the cell `name` starts from; `words`: the overrides of all cells, by name. Raises UserError."""
    after = ancestors(name, words)
    if not after:
        return Start()
    lora = _model_of(tuple(without_start(words[after[0]])))["lora"]
    refuse_adapter(name, after[0], lora)
    return Start(tuple(after), str(_model_of(tuple(words[after[-1]]))["path"]))


@functools.lru_cache(maxsize=256)
def _model_of(words: tuple[str, ...]) -> dict[str, Any]:
    """model.* that these overrides make."""
    tree = compose(list(words))
    assert tree is not None
    return dict(tree["model"])


def freeze_cells(definition: Definition, sweep: SweepFolder, target: Target) -> list[FrozenCell]:
    """All cells, composed, validated and resolved; nothing is written. Raises UserError that names the
    cell."""
    points = expand(definition)
    words = {point.name: point.words for point in points}
    return [freeze_cell(point, definition, sweep, target, read_start(point.name, words)) for point in points]


def freeze_cell(
    point: Point, definition: Definition, sweep: SweepFolder, target: Target, start: Start = Start()
) -> FrozenCell:
    """One cell, composed, validated and resolved."""
    words = [*point.words, *target.words]
    return freeze_words(point.name, point.axes, words, definition.group, sweep, target, start)


def freeze_words(
    name: str,
    axes: dict[str, str],
    words: list[str],
    group: str,
    sweep: SweepFolder,
    target: Target,
    start: Start = Start(),
) -> FrozenCell:
    """The cell that these words make, the target's among them.

    A cell that starts from another one is resolved with the model at the root, whose defaults are its own
    too; then model.path is the other cell's final/.
    """
    try:
        tree = compose(without_start(words) if start.after else words)
        assert tree is not None  # words are no flags: `rcpo.sweep.definition` has checked
        # Not as words: a name or a path may hold what Hydra's grammar gives a meaning to.
        tree |= {"name": name, "run_dir": str(sweep.cells / name)}
        if start.root is not None:
            tree["model"] |= {"path": start.root}
        tracking = tree["tracking"]
        tracking["group"] = tracking.get("group") or group
        tracking["tags"] = [*tracking.get("tags", []), *(f"{key}={value}" for key, value in axes.items())]
        root = target.resolve(validate(tree))
    except UserError as error:
        raise UserError(f"cell {name}: {error}") from None
    config = root
    if start.after:
        final = str(RunFolder(sweep.cells / start.after[0]).final)
        config = dataclasses.replace(root, model=dataclasses.replace(root.model, path=final, revision=None))
    return FrozenCell(Cell(name, axes, words, digest_of(root, start), list(start.after)), config, root)


def digest_of(config: ResolvedConfig, start: Start = Start()) -> str:
    """Hash of a config but for its run folder, so that a sweep folder may be moved. `config` has the model at
    the root."""
    tree: dict[str, Any] = config_tree(config) | {"run_dir": None}
    if start.after:
        tree["after"] = start.after
    text = json.dumps(tree, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_cells(sweep: SweepFolder, cells: Sequence[FrozenCell]) -> None:
    """Run folders of cells that have none. Hub models are frozen to the commits that they have now."""
    for frozen in cells:
        config = at_commit(frozen.root)  # the same for all of them
        if frozen.cell.after:  # a folder that is not there yet
            config = dataclasses.replace(config, model=frozen.config.model)
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
    return (
        {
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
        }
        | (
            {"first": {name: list(words) for name, words in definition.first.items()}}
            if definition.first
            else {}
        )
        | ({} if definition.search is None else {"search": asdict(definition.search)})
    )


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
