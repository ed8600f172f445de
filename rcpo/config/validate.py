"""The one validation of a composed tree: from plain containers to a `Config`, or one line that says what is
wrong."""

import json
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from rcpo.common.errors import UserError, shortened
from rcpo.config.schema import Config

Kind = TypeVar("Kind", bound=Config)
Section = TypeVar("Section")


def validate(tree: dict[str, Any]) -> Config:
    """Turn a composed, interpolated tree into a `Config`; raises UserError with one line for the first
    fault."""
    return validate_as(Config, tree)


def validate_as(kind: type[Kind], tree: dict[str, Any]) -> Kind:
    """The same for a config with narrower types (`rcpo.config.resolved`)."""
    config = section_of(kind, tree)
    from rcpo.config.rules import check_combinations  # which loads torch

    check_combinations(config)
    return config


def section_of(kind: type[Section], tree: dict[str, Any]) -> Section:
    """A section of a config, or all of it, checked field by field. Raises UserError with one line for the
    first fault."""
    try:
        # As JSON, because in Python mode strict dataclasses take instances only, no dicts.
        section: Section = TypeAdapter(kind).validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise UserError(_one_line(error)) from None
    return section


def _one_line(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    # Unknown keys first: a misspelt key is the likelier cause of whatever else is wrong.
    first = next((item for item in errors if item["type"] == "unexpected_keyword_argument"), errors[0])
    key = ".".join(str(part) for part in first["loc"] if not _is_union_arm(part))
    if first["type"] == "unexpected_keyword_argument":
        return f"{key}: no such key; `rcpo train --help` lists them (remove +{key}=...)"
    if first["type"] in ("missing", "missing_argument"):
        return f"{key}: has no value and needs one; type {key}=..."
    shown = shortened(yaml.safe_dump(first["input"], default_flow_style=True).removesuffix("...\n").strip())
    if first["type"] == "dataclass_type":
        return f"{key}={shown}: is a group of keys; type {key}.KEY=VALUE"
    rule = first["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    return f"{key}={shown}: {rule[0].lower() + rule[1:]}; type {key}=VALUE"


def _is_union_arm(part: object) -> bool:
    """pydantic names the member of a union it tried (`constrained-int`, `literal[...]`) in an error's
    location."""
    return isinstance(part, str) and (
        "[" in part
        or part in ("int", "float", "str", "constrained-int", "constrained-float", "constrained-str")
    )
