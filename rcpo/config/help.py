"""For `rcpo train --help`: groups, options and keys of the config that the other words choose.

Owns the layout alone. Values come from Hydra's composition (`rcpo.config.compose`), meanings from the
docstrings of `rcpo.config.schema`, and where that has none from the comments in the YAML files.
"""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rcpo.common.conf import conf_dir
from rcpo.config.compose import config_dirs, look_at
from rcpo.config.meanings import comments, first_comment, leaves, option_file, schema_meanings, shown
from rcpo.config.schema import Config

WIDTH = 110


def choices_text(words: list[str]) -> str:
    """Groups, options and keys of the config that these words of `rcpo train` choose. Raises UserError for
    words that Hydra refuses."""
    seen, folders = look_at(words), [*config_dirs(words), conf_dir()]
    own = [group for group in seen.options if group not in seen.tree and group != "hydra"]
    listed = [group for group in [*seen.tree, *own] if seen.options.get(group)]
    groups = [line for group in listed for line in _group_lines(group, seen.options, seen.choices, folders)]
    return "\n".join(
        [
            "groups: GROUP=OPTION selects a file of settings (* is selected now)",
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
        text = first_comment(option_file(group, option, folders))
        yield from _filled(f"   {mark} {option:<{width}}  ", text)


def _key_lines(tree: dict[str, Any], choices: dict[str, str], folders: Sequence[Path]) -> Iterator[str]:
    """A line for each key: dotted name, value, meaning."""
    shared = comments(folders[-1] / "every_objective.yaml")
    meanings = comments(folders[-1] / "config.yaml")
    meanings |= {f"objective.{key}": text for key, text in shared.items()}
    for group in tree:
        file = option_file(group, choices.get(group) or "", folders)
        meanings |= {f"{group}.{key}": text for key, text in comments(file).items()}
    meanings |= dict(schema_meanings(Config, ""))
    # Keys that stand alone first, then section by section; what all objectives have after what one has.
    own = sorted(tree["objective"].items(), key=lambda item: item[0] in shared)
    ordered = tree | {"objective": dict(own)}
    for name, value in sorted(leaves(ordered, ""), key=lambda leaf: "." in leaf[0]):
        if name not in HIDDEN:
            yield from _filled(f"  {f'{name}={shown(value)}':<34}  ", meanings.get(name, ""))


HIDDEN = (
    "objective.name",
    "calibration.name",
    "optim.name",
    "tracking.name",
    "data.source",
    "reference.name",
    "evaluation.name",
)
"""What the choice of an option decides, not keys to set."""


def _filled(start: str, text: str) -> Iterator[str]:
    """`start` and `text`, further lines of it indented to where it began."""
    indent = " " * (len(start) if len(start) <= 40 else 38)
    lines = textwrap.wrap(text, WIDTH - len(indent)) or [""]
    if len(start) > 40 and text:
        yield start.rstrip()
        start = indent
    yield (start + lines[0]).rstrip()
    yield from (indent + line for line in lines[1:])
