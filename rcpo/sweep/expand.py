"""From a checked sweep file to its cells: which combinations there are, in which order, and their names.

A pure function of the definition; composes nothing and writes nothing. Called by `rcpo.sweep.grow`.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rcpo.common.errors import UserError
from rcpo.sweep.definition import AxisValue, Definition

LABEL_AXIS = "include"
"""Key in a cell's axes of the label that `include` gave it."""
FIRST_AXIS = "first"
"""The one key in the axes of a cell that `first` names."""
LONGEST_NAME = 100
DIGEST_LETTERS = 8


@dataclass(frozen=True)
class Point:
    """One combination of values."""

    name: str
    """Safe as a file name, and unlike every other cell's on any file system."""
    axes: dict[str, str]
    words: list[str]
    """All overrides: the sweep's, the axes', the entry's of `include`."""


def expand(definition: Definition) -> list[Point]:
    """All cells: those of `first`, the grid without what is excluded, the slowest axis first, then what is
    included.

    Raises UserError when a cell is there twice, or none is left.
    """
    if definition.ranges:
        axis = next(iter(definition.ranges))
        raise UserError(f"axes.{axis}: is a range, for a search; type --search optuna, or list its values")
    combinations = [*_grid(definition), *_included(definition)]
    if not combinations:
        raise UserError("exclude: leaves no cell")
    first = [({FIRST_AXIS: name}, list(words)) for name, words in definition.first.items()]
    combinations = [*first, *combinations]
    seen: set[str] = set()
    for axes, _ in combinations:
        if (key := json.dumps(axes, sort_keys=True)) in seen:
            shown = ", ".join(f"{axis}: {label}" for axis, label in axes.items())
            raise UserError(f"include: the cell {{{shown}}} is there already; give the entry a label")
        seen.add(key)
    names = _names(definition, [axes for axes, _ in combinations])
    return [
        Point(name, axes, [*definition.overrides, *words])
        for name, (axes, words) in zip(names, combinations, strict=True)
    ]


def _grid(definition: Definition) -> Iterator[tuple[dict[str, str], list[str]]]:
    for values in _product(definition, definition.axes):
        if not any(_matches(exclusion, values) for exclusion in definition.exclude):
            yield _labels(values), _words(values)


def _included(definition: Definition) -> Iterator[tuple[dict[str, str], list[str]]]:
    for entry in definition.include:
        own = {} if entry.label is None else {LABEL_AXIS: entry.label}
        for values in _product(definition, definition.axes | entry.values):
            yield _labels(values) | own, [*_words(values), *entry.words]


def _product(
    definition: Definition, choices: Mapping[str, list[AxisValue]]
) -> Iterator[dict[str, AxisValue]]:
    """Every combination, in the sweep's order; axes in the order of the file."""
    for values in itertools.product(*(choices[axis] for axis in definition.order)):
        named = dict(zip(definition.order, values, strict=True))
        yield {axis: named[axis] for axis in definition.axes}


def _matches(exclusion: dict[str, list[str]], values: dict[str, AxisValue]) -> bool:
    return all(values[axis].label in labels for axis, labels in exclusion.items())


def _labels(values: dict[str, AxisValue]) -> dict[str, str]:
    return {axis: value.label for axis, value in values.items()}


def _words(values: dict[str, AxisValue]) -> list[str]:
    return [word for value in values.values() for word in value.words]


def _names(definition: Definition, cells: list[dict[str, str]]) -> list[str]:
    """A name each. Where other letters had to be replaced, or two names would be one file on a system that
    ignores case, a digest of the cell's labels ends the name."""
    wished = [axes.get(FIRST_AXIS) or _filled(definition.cell_name, axes) for axes in cells]
    slugs = [_slug(name) for name in wished]
    times = Counter(slug.casefold() for slug in slugs)
    names = []
    for name, slug, axes in zip(wished, slugs, cells, strict=True):
        if slug != name or times[slug.casefold()] > 1:
            slug = f"{slug[: LONGEST_NAME - DIGEST_LETTERS - 1]}-{digest_of_axes(axes)}"
        names.append(slug)
    return names


def name_of(definition: Definition, labels: dict[str, str]) -> str:
    """The name of one cell of these labels, as far as they alone decide it."""
    return _slug(_filled(definition.cell_name, labels))


def digest_of_axes(axes: Mapping[str, str]) -> str:
    """The same for the same labels."""
    return hashlib.sha256(json.dumps(axes, sort_keys=True).encode()).hexdigest()[:DIGEST_LETTERS]


def _filled(template: str, axes: dict[str, str]) -> str:
    name = re.sub(r"\{([^{}]*)\}", lambda match: axes[match[1]], template)
    return name if LABEL_AXIS not in axes else f"{name}-{axes[LABEL_AXIS]}"


def _slug(name: str) -> str:
    """`name` with what file names and shells could take amiss replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-")[:LONGEST_NAME] or "cell"
