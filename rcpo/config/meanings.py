"""What conf/*.yaml and the schema say of options and keys: values, comments, docstrings.

Read by `rcpo.config.help` (`rcpo train --help`) and `rcpo.config.keys` (conf/README.md). Composes nothing.
"""

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml


def leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every key that holds no section."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def shown(value: Any) -> str:
    """A value as it is typed."""
    text = "null" if value is None else yaml.safe_dump(value, default_flow_style=True, width=200)
    return text.removesuffix("\n").removesuffix("\n...").strip("'")


def schema_meanings(config_type: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of every key of the schema that has one."""
    for name, field in config_type.__pydantic_fields__.items():
        if is_dataclass(field.annotation):
            yield from schema_meanings(field.annotation, f"{prefix}{name}.")
        elif field.description:
            yield f"{prefix}{name}", " ".join(field.description.split())


def option_file(group: str, option: str, folders: Sequence[Path]) -> Path | None:
    """The YAML file behind GROUP=OPTION, in the first folder that has one."""
    paths = (folder / group / f"{option}.yaml" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def first_comment(path: Path | None) -> str:
    """What the file says of itself in its first lines, up to one that ends a sentence, but for Hydra's own
    directives."""
    said: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path else []:
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or (said and said[-1].endswith(".")):
            break
        if not text.startswith("@package"):
            said.append(text)
    return " ".join(said)


def comments(path: Path | None) -> dict[str, str]:
    """The comment behind each key of a YAML file, by dotted name; two levels are enough for rcpo's files."""
    section, found = "", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path else []:
        match = re.match(r"( *)(\w+):(?:.*?\s#\s+(.*))?", line)
        if match is None:
            continue
        section = section if match[1] else match[2]
        if match[3]:
            found[f"{section}.{match[2]}" if match[1] else match[2]] = match[3]
    return found


def field_docstrings(config_type: type) -> dict[str, str]:
    """The docstring below each field of a plain dataclass, by the field's name."""
    (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body
    assert isinstance(parsed, ast.ClassDef)
    found = {}
    for field, below in itertools.pairwise(parsed.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(below.value, ast.Constant)
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found
