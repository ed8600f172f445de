"""Matrices of trainings: a few rows run always, the whole matrix with `pytest -m ci`; and only what is asked
for is trained."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def matrix(rows: Iterable[Any], always: Callable[[Any], bool], kind: str) -> list[Any]:
    """Parameters of a test: rows that are not `always` run are of the kind ci, with `kind` as its name."""
    params = []
    for row in rows:
        values = row if isinstance(row, tuple) and not hasattr(row, "_fields") else (row,)
        params.append(pytest.param(*values, marks=() if always(row) else pytest.mark.ci(kind)))
    return params


def asked_for(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Parameters of all tests of the fixture's module that run in this session."""
    return [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
