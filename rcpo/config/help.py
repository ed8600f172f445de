"""For `rcpo train --help`: groups, options and keys of the config that the other words choose.

Owns the layout alone. Values come from Hydra's composition (`rcpo.config.compose`), meanings from the
docstrings of `rcpo.config.schema`, and where that has none from the comments in the YAML files.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from rcpo.config.compose import conf_dir, config_dirs, look_at
from rcpo.config.schema import Config

WIDTH = 110


def choices_text(words: list[str]) -> str:
    """Groups, options and keys of the config that these words of `rcpo train` choose. Raises UserError for
    words that Hydra refuses."""
    seen, folders = look_at(words), [*config_dirs(words), conf_dir()]
    own = [group for group in seen.options if group not in seen.tree and group != "hydra"]
    shown = [group for group in [*seen.tree, *own] if seen.options.get(group)]
    groups = [line for group in shown for line in _group_lines(group, seen.options, seen.choices, folders)]
    return "\n".join(
        [
            "groups: GROUP=OPTION chooses a file of settings (* is chosen now)",
            *groups,
            "",
            "keys: KEY=VALUE sets one (shown: its value now; null: rcpo decides; ???: you must give it)",
            *_key_lines(seen.tree, seen.choices, folders),
        ]
    )


def _group_lines(
    group: str, options: dict[str, list[str]], choices: dict[str, str], folders: Sequence[Path]
) -> Iterator[str]:
    yield f"  {group}"
    width = max(len(option) for option in options[group])
    for option in options[group]:
        mark = "*" if choices.get(group) == option else " "
        text = _first_comment(_option_file(group, option, folders))
        yield from _filled(f"   {mark} {option:<{width}}  ", text)


def _key_lines(tree: dict[str, Any], choices: dict[str, str], folders: Sequence[Path]) -> Iterator[str]:
    """A line for each key: dotted name, value, meaning."""
    shared = _comments(folders[-1] / "every_objective.yaml")
    meanings = _comments(folders[-1] / "config.yaml")
    meanings |= {f"objective.{key}": text for key, text in shared.items()}
    for group in tree:
        file = _option_file(group, choices.get(group) or "", folders)
        meanings |= {f"{group}.{key}": text for key, text in _comments(file).items()}
    meanings |= dict(_schema_meanings(Config, ""))
    # Keys that stand alone first, then section by section; what all objectives have after what one has.
    own = sorted(tree["objective"].items(), key=lambda item: item[0] in shared)
    ordered = tree | {"objective": dict(own)}
    for name, value in sorted(_leaves(ordered, ""), key=lambda leaf: "." in leaf[0]):
        if name not in HIDDEN:
            yield from _filled(f"  {f'{name}={_shown(value)}':<34}  ", meanings.get(name, ""))


HIDDEN = (
    "objective.name",
    "calibration.name",
    "optim.name",
    "tracking.name",
    "data.source",
    "reference.name",
)
"""What the choice of an option decides, not keys to set."""


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every key that holds no section."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _filled(start: str, text: str) -> Iterator[str]:
    """`start` and `text`, further lines of it indented to where it began."""
    indent = " " * (len(start) if len(start) <= 40 else 38)
    lines = textwrap.wrap(text, WIDTH - len(indent)) or [""]
    if len(start) > 40 and text:
        yield start.rstrip()
        start = indent
    yield (start + lines[0]).rstrip()
    yield from (indent + line for line in lines[1:])


def _shown(value: Any) -> str:
    text = "null" if value is None else yaml.safe_dump(value, default_flow_style=True, width=200)
    return text.removesuffix("\n").removesuffix("\n...").strip("'")


def _schema_meanings(config_type: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in config_type.__pydantic_fields__.items():
        if is_dataclass(field.annotation):
            yield from _schema_meanings(field.annotation, f"{prefix}{name}.")
        elif field.description:
            yield f"{prefix}{name}", " ".join(field.description.split())


def _option_file(group: str, option: str, folders: Sequence[Path]) -> Path | None:
    paths = (folder / group / f"{option}.yaml" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def _first_comment(path: Path | None) -> str:
    """What the file says of itself in its first line, but for Hydra's own directives."""
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    texts = (line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return next((text for text in texts if not text.startswith("@package")), "")


def _comments(path: Path | None) -> dict[str, str]:
    """The comment behind each key of a YAML file, by dotted name; two levels are enough for rcpo's files."""
    section, comments = "", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path else []:
        match = re.match(r"( *)(\w+):(?:.*?\s#\s+(.*))?", line)
        if match is None:
            continue
        section = section if match[1] else match[2]
        if match[3]:
            comments[f"{section}.{match[2]}" if match[1] else match[2]] = match[3]
    return comments
