"""The sweep file: what a grid is made of, read and checked. Composes nothing: `rcpo.sweep.freeze` does.

A file, every key but `axes` optional (sweeps/demo.yaml is one):

    name: demo                     # default: the file's name without its suffix
    group: demo                    # W&B group of the cells; default: name
    overrides: [train.steps=300]   # of every cell, as on the command line of `rcpo train`
    axes:                          # one cell for each combination of values
      objective: [dpo, {label: dpo_b05, overrides: [objective=dpo, objective.beta=0.5]}]
      calibration: [off, on]
    seeds: [0, 1, 2]               # an axis named seed
    exclude: [{objective: dpo, calibration: on}]   # cells that match all that is named are left out
    first: {sft: [objective=sft]}  # more cells, out of the grid: their names and their own overrides
    include:                       # more cells: an axis not named takes all its values, one named any value
      - {objective: simpo, seed: 7, label: long, overrides: [train.steps=900]}
    order: [seed]                  # the axes that vary slowest; the others follow as the file has them
    cell_name: "{objective}-{calibration}-{seed}"
    search: {metric: eval/displacement/margin, direction: maximize}   # and ranges as axes: `rcpo.sweep.space`
    estimate: {pairs_per_second: 20, start_seconds: 60, train_pairs: {HUB_ID: 61135}}   # for a dry run

`model.path: [cell:sft]` as an axis, or the override model.path=cell:sft, makes cells start from what the cell
named sft has trained (`rcpo.sweep.start`); NAME may be any cell's.

Every scalar is text, as typed: off stays off, and quotes make no difference.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import rcpo
from rcpo.common.errors import UserError
from rcpo.sweep.space import Range, Search, is_range, range_of, search_of
from rcpo.sweep.start import KEY, PREFIX

SEED = "seed"
"""The axis that `seeds` makes."""
RESERVED = ("first", "include", "label", "overrides")
"""Names that no axis can have."""
INCLUDE_KEYS = ("label", "overrides")
"""What an entry of `include` may hold beside axes."""
_AXIS = re.compile(r"\+{0,2}[A-Za-z_][\w./@-]*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OWN = ("name", "run_dir")
"""Keys that every cell gets from its place in the sweep."""


@dataclass(frozen=True)
class AxisValue:
    """One value of an axis: how it is called, and the overrides that it stands for."""

    label: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Include:
    """Cells beside the grid: values of some axes, and overrides of their own under a label."""

    values: dict[str, list[AxisValue]]
    words: tuple[str, ...] = ()
    label: str | None = None


@dataclass(frozen=True)
class Estimate:
    """What a dry run cannot measure."""

    pairs_per_second: float | None = None
    """Pairs that one cell trains on in a second."""
    train_pairs: dict[str, int] = field(default_factory=dict)
    """Training pairs of data sets on the hub, by data.path."""
    start_seconds: float = 15.0
    """Until a cell's first step: libraries, model, data. The embedded default takes 5 to 10; weights of 16
    GB from a network's disk take minutes."""


@dataclass(frozen=True)
class Definition:
    """A checked sweep file."""

    name: str
    group: str
    overrides: tuple[str, ...]
    axes: dict[str, list[AxisValue]]
    """`seeds` among them, last."""
    exclude: list[dict[str, list[str]]]
    include: list[Include]
    order: tuple[str, ...]
    """All axes, the slowest first."""
    cell_name: str
    estimate: Estimate
    ranges: dict[str, Range] = field(default_factory=dict)
    """Axes that only a search can have."""
    search: Search | None = None
    first: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Cells beside the grid that others start from: their names and their own overrides."""


def read_definition(path: str, more: Sequence[str] = ()) -> Definition:
    """The sweep file at `path`, or the shipped one of that name, with further base overrides `more`. Raises
    UserError with one line."""
    file = _shipped(path) or Path(path)
    try:
        tree = read_tree(file)
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "is not UTF-8 text"
        shipped = ", ".join(file.stem for file in shipped_files())
        raise UserError(
            f"{path}: {said}; give a sweep file, or the name of one of rcpo's: {shipped}"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())[:200]})") from None
    try:
        return definition_of(tree, file.stem, more)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_tree(file: Path) -> Any:
    """The content of a sweep file, every scalar as text."""
    return yaml.load(file.read_text(encoding="utf-8"), Loader=_TextLoader)


def shipped_files() -> list[Path]:
    """The sweeps that ship with rcpo: inside the package (a wheel), else beside it (a source tree)."""
    package = Path(rcpo.__file__).resolve().parent
    for folder in (package / "sweeps", package.parent / "sweeps"):
        if (folder / "demo.yaml").is_file():
            return sorted(folder.glob("*.yaml"))
    return []


def _shipped(path: str) -> Path | None:
    """demo, demo.yaml or sweeps/demo.yaml, where no file of the user's has that path."""
    if Path(path).exists():
        return None
    names = [(file.stem, file.name, f"sweeps/{file.name}") for file in shipped_files()]
    return next((file for file, own in zip(shipped_files(), names, strict=True) if path in own), None)


class _TextLoader(yaml.BaseLoader):
    """Scalars as they are typed; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def definition_of(tree: Any, stem: str, more: Sequence[str]) -> Definition:
    """The definition that a file of this content and stem has, with further base overrides `more`."""
    known = {item.name for item in dataclasses.fields(Definition)} - {"ranges"} | {"seeds"}
    if not isinstance(tree, dict):
        raise UserError("must hold keys and values; it needs axes: {KEY: [VALUE, ...]}")
    for key in tree:
        if key not in known:
            raise UserError(f"{key}: no such key; the keys are {', '.join(sorted(known))}")
    name = _text(tree.get("name", stem), "name")
    if not _NAME.fullmatch(name):
        raise UserError(
            f"name: {name!r}: must be 1 to 100 letters, digits, '.', '_' or '-', and start with a letter or "
            "digit"
        )
    ranges = _ranges(tree)
    axes = _axes(tree, ranges)
    overrides = (*_words(tree.get("overrides", []), "overrides"), *more)
    for word in overrides:
        if word.lstrip("+").split("=")[0] in axes | ranges:
            raise UserError(f"{word}: {word.lstrip('+').split('=')[0]} is an axis of this sweep; remove one")
    order = [_text(item, "order") for item in _list(tree.get("order", []), "order")]
    for axis in order:
        _check_axis(axis, axes, "order")
    if len(set(order)) < len(order):
        raise UserError("order: names an axis twice")
    return Definition(
        name=name,
        group=_text(tree.get("group", name), "group"),
        overrides=overrides,
        axes=axes,
        exclude=[_exclusion(item, axes) for item in _list(tree.get("exclude", []), "exclude")],
        include=[_inclusion(item, axes) for item in _list(tree.get("include", []), "include")],
        order=(*order, *(axis for axis in axes if axis not in order)),
        cell_name=_template(tree.get("cell_name"), axes | {axis: [AxisValue("0", ())] for axis in ranges}),
        estimate=_estimate(tree.get("estimate", {})),
        ranges=ranges,
        search=None if tree.get("search") in (None, "null") else search_of(tree["search"]),
        first=_first(tree.get("first", {}), ranges),
    )


def _first(tree: Any, ranges: dict[str, Range]) -> dict[str, tuple[str, ...]]:
    """Cells out of the grid, by name."""
    given = _mapping(tree, "first")
    if given and ranges:
        raise UserError("first: is for grids, and a search has only its trials; remove it")
    for name in given:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"first: {name!r}: must be 1 to 100 letters, digits, '.', '_' or '-', and start with a "
                "letter or digit"
            )
    return {name: _words(words, f"first.{name}") for name, words in given.items()}


def _ranges(tree: dict[str, Any]) -> dict[str, Range]:
    """The axes that are ranges."""
    listed = _mapping(tree.get("axes", {}), "axes")
    ranges = {key: range_of(key, value) for key, value in listed.items() if is_range(value)}
    for key in ranges:
        _check_key(key)
    return ranges


def _check_key(key: str) -> None:
    if key in RESERVED or not _AXIS.fullmatch(key):
        raise UserError(f"axes.{key}: is not the name of a config key or group")


def _axes(tree: dict[str, Any], ranges: dict[str, Range]) -> dict[str, list[AxisValue]]:
    listed = _mapping(tree.get("axes", {}), "axes")
    if "seeds" in tree:
        if SEED in listed:
            raise UserError("seeds: axes has seed too; give one of the two")
        listed = listed | {SEED: tree["seeds"]}
    if not listed and not ranges:
        raise UserError("axes: has no value and needs one; write axes: {KEY: [VALUE, ...]}")
    axes = {}
    for key, values in listed.items():
        if key in ranges:
            continue
        _check_key(key)
        axes[key] = [_axis_value(key, value) for value in _list(values, f"axes.{key}")]
        labels = [value.label for value in axes[key]]
        if not labels:
            raise UserError(f"axes.{key}: must list at least one value")
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise UserError(f"axes.{key}: {twice} is there twice")
    return axes


def _axis_value(key: str, value: Any) -> AxisValue:
    """A plain value is the override KEY=VALUE; {label, overrides} stands for any overrides."""
    if not isinstance(value, dict):
        text = _hydra_text(value)
        if not text:
            raise UserError(f"axes.{key}: an empty value; write null where you mean it")
        return AxisValue(text.removeprefix(PREFIX) if key == KEY else text, (f"{key}={text}",))
    if set(value) != set(INCLUDE_KEYS):
        raise UserError(f"axes.{key}: a value with keys must be {{label: NAME, overrides: [KEY=VALUE, ...]}}")
    return AxisValue(
        _text(value["label"], f"axes.{key}.label"), _words(value["overrides"], f"axes.{key}.overrides")
    )


def _hydra_text(value: Any) -> str:
    """A value as Hydra's command line reads it; lists and mappings may lie in it."""
    if isinstance(value, list):
        return f"[{','.join(_hydra_text(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_hydra_text(item)}' for key, item in value.items())}}}"
    return str(value)


def _exclusion(entry: Any, axes: dict[str, list[AxisValue]]) -> dict[str, list[str]]:
    if not isinstance(entry, dict) or not entry:
        raise UserError("exclude: each entry must name axes and values, as in {objective: dpo}")
    exclusion = {}
    for axis, value in entry.items():
        _check_axis(axis, axes, "exclude")
        labels = [_hydra_text(item) for item in (value if isinstance(value, list) else [value])]
        known = [item.label for item in axes[axis]]
        for label in labels:
            if label not in known:
                raise UserError(f"exclude: {axis} has no value {label}; it has {', '.join(known)}")
        exclusion[axis] = labels
    return exclusion


def _inclusion(entry: Any, axes: dict[str, list[AxisValue]]) -> Include:
    if not isinstance(entry, dict) or not entry:
        raise UserError("include: each entry must name axes and values, as in {objective: dpo, seed: 7}")
    named = {axis: value for axis, value in entry.items() if axis not in INCLUDE_KEYS}
    values = {}
    for axis, value in named.items():
        _check_axis(axis, axes, "include")
        known = {item.label: item for item in axes[axis]}
        new = [_axis_value(axis, item) for item in (value if isinstance(value, list) else [value])]
        values[axis] = [known.get(item.label, item) for item in new]
    words = _words(entry.get("overrides", []), "include.overrides")
    if words and "label" not in entry:
        raise UserError("include: an entry with overrides needs a label, which ends the names of its cells")
    label = _text(entry["label"], "include.label") if "label" in entry else None
    return Include(values, words, label)


def _check_axis(axis: str, axes: dict[str, list[AxisValue]], where: str) -> None:
    if axis not in axes:
        raise UserError(f"{where}: {axis} is no axis of this sweep; its axes are {', '.join(axes)}")


def _template(template: Any, axes: dict[str, list[AxisValue]]) -> str:
    """The given name template; by default all values, those that begin with no letter behind their key."""
    if template is None:
        parts = []
        for axis, values in axes.items():
            speaks = all(value.label[:1].isalpha() for value in values)
            parts.append(f"{'' if speaks else re.split(r'[./@]', axis)[-1]}{{{axis}}}")
        return "-".join(parts)
    for axis in re.findall(r"\{([^{}]*)\}", _text(template, "cell_name")):
        _check_axis(axis, axes, "cell_name")
    return str(template)


def _estimate(tree: Any) -> Estimate:
    given = _mapping(tree, "estimate")
    for key in given:
        if key not in ("pairs_per_second", "train_pairs", "start_seconds"):
            raise UserError(
                f"estimate.{key}: no such key; the keys are pairs_per_second, start_seconds, train_pairs"
            )
    pairs = _mapping(given.get("train_pairs", {}), "estimate.train_pairs")
    rate = given.get("pairs_per_second")
    return Estimate(
        None if rate is None else positive_number(rate, "estimate.pairs_per_second"),
        {key: int(positive_number(value, f"estimate.train_pairs.{key}")) for key, value in pairs.items()},
        positive_number(given.get("start_seconds", Estimate.start_seconds), "estimate.start_seconds"),
    )


def positive_number(text: Any, key: str) -> float:
    """`text` as a number above 0, or UserError that names `key`."""
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"{key}: {text}: must be a number above 0")
    return number


def _words(value: Any, key: str) -> tuple[str, ...]:
    """Overrides as on the command line."""
    words = tuple(_text(item, key) for item in _list(value, key))
    for word in words:
        if word.startswith("-") or ("=" not in word and not word.startswith("~")):
            raise UserError(f"{key}: {word}: must be KEY=VALUE or GROUP=OPTION")
        if word.lstrip("+~").split("=")[0] in _OWN:
            raise UserError(f"{key}: {word}: every cell's name and folder come from the sweep; remove it")
    return words


def check_words(words: Sequence[str]) -> None:
    """UserError for what is no override, among words of `rcpo sweep`'s command line."""
    _words(list(words), "sweep")


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{key}: must be a list; write [VALUE, ...]")
    return value


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{key}: must hold keys and values; write {key.rsplit('.')[-1]}: {{KEY: VALUE}}")
    return value


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{key}: must be text")
    return value
