"""Rules for an objective's parameters: kinds and ranges, and the error that names value, rule and example.

The configs beside the loss functions call `require` in `__post_init__`; `rcpo.objectives.registry` turns a
`ParameterError` into one line that says where the value stands. Does not know objectives.
"""

import math
from typing import Any


class ParameterError(ValueError):
    """A parameter's value breaks its rule."""

    def __init__(self, key: str, value: Any, rule: str, example: Any = None) -> None:
        """`example`: what to type; None: the parameter's default."""
        super().__init__(f"{key}={value}: must be {rule}")
        self.key, self.value, self.rule, self.example = key, value, rule, example


def config_key(field_name: str) -> str:
    """The YAML key of a config field: Python's reserved words carry an underscore here (lambda_) and none
    there."""
    return field_name.removesuffix("_")


def require(config: Any, name: str, holds: bool, rule: str) -> None:
    """Raise ParameterError for the field `name` unless `holds`."""
    if not holds:
        raise ParameterError(config_key(name), getattr(config, name), rule)


def require_positive(config: Any, *names: str) -> None:
    """Each named field > 0."""
    for name in names:
        require(config, name, getattr(config, name) > 0, "greater than 0")


def require_not_negative(config: Any, *names: str) -> None:
    """Each named field >= 0."""
    for name in names:
        require(config, name, getattr(config, name) >= 0, "0 or greater")


def check_kind(key: str, value: Any, default: Any) -> None:
    """Raise ParameterError unless `value` is of its default's kind: true or false, a list, text, or a finite
    number; where the default is none of these, anything goes."""
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, list):
        fits, kind = isinstance(value, list | tuple), "a list"
    elif isinstance(default, str):
        fits, kind = isinstance(value, str), "text"
    elif not isinstance(default, int | float):
        return
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits, kind = number and math.isfinite(value), "a finite number"
    if not fits:
        raise ParameterError(key, value, kind)
