"""How groups are called: in as few words as tell them apart, and never by what changes no number.

Most groups of a folder agree in most settings: the value that more than half of them have goes without
saying, and a note below the table says it once.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rcpo.comparison.keys import SPEED_ALONE, is_of_kind, matches
from rcpo.comparison.load import one_line

if TYPE_CHECKING:
    from rcpo.comparison.groups import Group

NONE = "-"
"""A setting that a group does not have."""


def name_groups(groups: "Sequence[Group]") -> dict[str, str]:
    """Fill in `kind`, `shown`, `row_label`, and make labels unlike each other; returns what goes without
    saying."""
    _name_kinds(groups)
    values = {
        key: _shorter([one_line(group.settings.get(key, NONE)) for group in groups])
        for key in _that_matter(groups)
    }
    usual = {}
    for key, found in values.items():
        if (value := of_most(found)) is not None:
            usual[key] = value
        for group, own in zip(groups, found, strict=True):
            if own not in (usual.get(key), NONE):
                group.shown[key] = own
    kinds = Counter(group.kind for group in groups)
    usual_kind = kinds.most_common(1)[0][0]
    for group in groups:
        words = [group.objective, *(f"{key}={value}" for key, value in group.shown.items())]
        group.row_label = " ".join([*words, *([f"({group.kind})"] if group.kind != usual_kind else [])])
    _tell_apart(groups)
    return usual


def _shorter(values: list[str]) -> list[str]:
    """Absolute paths by their last part, and numbers that a search drew by four digits, where that tells them
    apart as well."""
    short = [PurePath(value).name if value.startswith("/") else _four_digits(value) for value in values]
    return short if len(set(short)) == len(set(values)) else values


def _four_digits(value: str) -> str:
    """Whole numbers, and words, as they are."""
    try:
        shorter = f"{float(value):.4g}"
    except ValueError:
        return value
    return shorter if not value.isdecimal() and len(shorter) < len(value) else value


def of_most(values: Sequence[str]) -> str | None:
    """The value that more than half of them are, if there is one."""
    value, times = Counter(values).most_common(1)[0]
    return value if 2 * times > len(values) else None


def _that_matter(groups: "Sequence[Group]") -> list[str]:
    keys = {key for group in groups for key in group.other}
    found = _with_two_values([group.settings for group in groups])
    kinds = {
        kind: [group.settings for group in groups if group.kind == kind] for kind in (g.kind for g in groups)
    }
    within = {key for own in kinds.values() for key in _with_two_values(own)}
    return [
        key
        for key in found
        if key in keys
        and not (is_of_kind(key) or matches(key, SPEED_ALONE))
        and (key in within or not key.startswith("data."))
    ]


def _with_two_values(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Keys with two values or more: one that only some runs have, being older, is none."""
    keys = dict.fromkeys(key for own in settings for key in own)
    return [key for key in keys if len({repr(own[key]) for own in settings if key in own}) > 1]


def _tell_apart(groups: "Sequence[Group]") -> None:
    """Groups that differ in their speed alone are called after their runs."""
    seen: set[str] = set()
    for group in groups:
        if group.label in seen:
            group.calibration = f"{group.calibration} ({group.name})"
        seen.add(group.label)


def _name_kinds(groups: "Sequence[Group]") -> None:
    """Model and data in a few words; further settings where two kinds would have the same ones."""
    own = [_of_kind(group.settings) for group in groups]
    short = [_short_kind(settings) for settings in own]
    differing: dict[str, list[str]] = {}
    for label in dict.fromkeys(short):
        namesakes = [settings for name, settings in zip(short, own, strict=True) if name == label]
        differing[label] = _with_two_values(namesakes)
    for group, label, settings in zip(groups, short, own, strict=True):
        more = [f"{key}={one_line(settings.get(key, NONE))}" for key in differing[label]]
        group.kind = ", ".join([label, *more])


def _of_kind(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if is_of_kind(key)}


def _short_kind(settings: dict[str, Any]) -> str:
    """MODEL on DATA, each by the last part of its path."""
    path, data = settings.get("model.path", "?"), settings.get("data.path")
    model = one_line(path).rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    paths = data if isinstance(data, list) else [] if data is None else [data]
    names = [PurePath(one_line(each)).name for each in paths] or [one_line(settings.get("data.source", "?"))]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{model} on {names[0]}{more}"
