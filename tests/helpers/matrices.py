"""Matrices of runs, of which plain `pytest` does a part and `pytest -m ci` the rest."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest


def matrix(
    names: str, values: Sequence[Any], here: Collection[Any], kind: str, ids: Callable[[Any], str] = str
) -> pytest.MarkDecorator:
    """Parametrize over all `values`; those that are not among `here` are of `ci`, as `kind`."""
    assert all(value in values for value in here), "a value of plain pytest that is none of the matrix"
    many = "," in names
    marks = {True: (), False: (pytest.mark.ci(kind),)}
    made = [
        pytest.param(*(value if many else (value,)), marks=marks[value in here],
                     id="-".join(map(ids, value)) if many else ids(value))
        for value in values
    ]  # fmt: skip
    return pytest.mark.parametrize(names.replace(" ", "").split(","), made)


def selected(request: pytest.FixtureRequest, *names: str) -> list[tuple[Any, ...]]:
    """Values of these parameters of the tests of the fixture's module that will run, in their order."""
    found: dict[tuple[Any, ...], None] = {}
    for item in request.session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path == request.path and set(names) <= set(params):
            found[tuple(params[name] for name in names)] = None
    return list(found)
