"""A value in conf/ is what users get. The schema's own default is for configs that lack the key, and is the
same wherever conf/ has one value."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import yaml

from rcpo.config.compose import conf_dir
from rcpo.config.schema import Config

OTHERWISE = {
    "calibration.every": "8 for those that measure scores; metrics.geometry_every counts for the others",
    "calibration.warmup_steps": "the same, 50",
    "data.on_bad_row": "real files nearly always hold a few; a bad generated problem is rcpo's fault",
}
"""Keys whose default in the schema is another than conf/'s, and why."""
BASES = {"": "config.yaml", "data.filter.": "data_filter.yaml", "model.": "every_model.yaml"}
"""Files beside the groups, and where their keys belong."""


def leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def values_in_conf() -> dict[str, list[Any]]:
    """Every value that a file of conf/ gives to a key, but for ???, which users must replace."""
    folder = conf_dir()
    trees = [(f"{path.parent.name}.", path) for path in sorted(folder.glob("*/*.yaml"))]
    trees += [(prefix, folder / name) for prefix, name in BASES.items()]
    found: dict[str, list[Any]] = {}
    for prefix, path in trees:
        for key, value in leaves(yaml.safe_load(path.read_text()) or {}, prefix):
            found.setdefault(key, [])
            if value != "???" and value not in found[key]:
                found[key].append(value)
    return found


def schema_defaults(config_type: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in config_type.__pydantic_fields__.items():
        if is_dataclass(field.annotation):
            yield from schema_defaults(field.annotation, f"{prefix}{name}.")
        elif not field.is_required():
            yield f"{prefix}{name}", field.get_default(call_default_factory=True)


def test_where_conf_has_one_value_the_schema_has_the_same() -> None:
    values, defaults = values_in_conf(), dict(schema_defaults(Config, ""))
    assert {key: default for key, default in defaults.items() if key in OTHERWISE} == {
        "calibration.every": 1, "calibration.warmup_steps": 0, "data.on_bad_row": "error",
    }  # fmt: skip
    assert {
        key: (default, values[key])
        for key, default in defaults.items()
        if key not in OTHERWISE and len(values.get(key, [])) == 1 and values[key] != [default]
    } == {}


def test_every_key_of_the_schema_can_be_set_in_some_option() -> None:
    """Else it would be refused on the command line as a key that is not there."""
    assert {key for key, _ in schema_defaults(Config, "")} <= set(values_in_conf())
