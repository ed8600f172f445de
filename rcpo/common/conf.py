"""The folder conf/, and the defaults that stand there, once.

What a YAML file of conf/ says is what users get, through Hydra. The schema does not repeat it: where a config
lacks a key, because its option has no use for it or an older rcpo froze it, the schema reads the value here.
Imports neither Hydra nor torch. Called by `rcpo.config.schema`, and for the folder by everyone.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

import rcpo
from rcpo.common.errors import UserError

Section = TypeVar("Section", bound=type)
IN_CONF: Any = object()
"""Stands for the default of a field whose class is under `defaults_in`."""


def conf_dir() -> Path:
    """The folder of shipped YAML files: inside the package (a wheel), else beside it (a source tree)."""
    package = Path(rcpo.__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"no conf/ folder beside or inside {package}; install rcpo again")


def defaults_in(*places: str) -> Callable[[Section], Section]:
    """For a class of the schema: each field that is `IN_CONF` has its default in the first of these places
    that gives it a value. A place is a file of conf/ without .yaml, then the sections in it:
    "calibration/feedback feedback"."""

    def with_defaults(section: Section) -> Section:
        for name, value in list(vars(section).items()):
            if value is IN_CONF:
                setattr(section, name, field(default_factory=partial(value_in_conf, places, name)))
        return section

    return with_defaults


def value_in_conf(places: tuple[str, ...], key: str) -> Any:
    """Raises UserError where no place gives the key a value; ???, which users must replace, is none."""
    for place in places:
        file, *sections = place.split()
        tree: Any = option_tree(conf_dir() / f"{file}.yaml")
        for section in sections:
            tree = tree.get(section, {})
        if tree.get(key, "???") != "???":
            return copy.deepcopy(tree[key])
    files = " and ".join(f"conf/{place.split()[0]}.yaml" for place in places)
    raise UserError(f"{key}: has no default in {files}; put it back there")


@functools.cache
def option_tree(file: Path) -> dict[str, Any]:
    """The keys of a YAML file of conf/ over those of the options in the same folder that its `defaults` name,
    as Hydra has them; not to be changed."""
    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(own, dict):
        return {}
    tree: dict[str, Any] = {}
    if file.parent != conf_dir():  # config.yaml's defaults are groups
        for name in own.pop("defaults", []):
            if isinstance(name, str) and name != "_self_":  # an experiment's are groups, too
                tree |= option_tree(file.with_name(f"{name}.yaml"))
    return tree | own
