"""Types that several sections of the config share."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _one_printable_line(value: str) -> str:
    if not value or not value.isprintable():
        raise ValueError("must be one line of printable text, and not empty")
    return value


Text = Annotated[str, BeforeValidator(_text), AfterValidator(_one_printable_line)]
"""A string; the command line reads name=123 as a number, which is meant as text here."""


def _paths(value: object) -> object:
    given = [_text(path) for path in value] if isinstance(value, list) else [_text(value)]
    if not given or not all(isinstance(path, str) for path in given):
        raise ValueError("must be a path, or a list of paths that is not empty")
    for path in given:
        _one_printable_line(str(path))
    return given if isinstance(value, list) else given[0]


Paths = Annotated[str | list[str], BeforeValidator(_paths)]
"""One, or several that are read one behind the other."""
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Stage = Annotated[int, Field(ge=0, le=3)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""torch takes no larger ones."""
