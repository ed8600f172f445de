"""What a module of rcpo may import where it is itself imported: the standard library, rcpo, and what every
installation has. Extras are imported where they are asked for, so that each module loads without them."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions

import pytest

from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BROUGHT = {"numpy", "huggingface-hub", "tokenizers", "fsspec", "httpx", "markupsafe"}
"""By transformers, datasets and jinja2, which cannot do without."""


def normal(requirement: str) -> str:
    """The package's name alone, as PEP 503 normalises it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def imported_at_once(body: list[ast.stmt]) -> Iterator[str]:
    """Top packages that these statements import without a function being called; not what only type checkers
    read, nor what may be missing (`try`)."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0
            yield str(statement.module).partition(".")[0]
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) != "TYPE_CHECKING":
            yield from imported_at_once(statement.body + statement.orelse)
        elif isinstance(statement, ast.ClassDef | ast.With):
            yield from imported_at_once(statement.body)


@pytest.mark.parametrize(
    ("folder", "own", "extras"),
    [("rcpo", {"rcpo"}, []), ("tests", {"rcpo", "helpers", "conftest"}, ["test"])],
)
def test_no_module_needs_an_extra_to_be_imported(folder: str, own: set[str], extras: list[str]) -> None:
    """Nor is a file of tests that need one anything but left out where it is not there."""
    asked = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    allowed = {normal(text) for part in asked for text in part} | BROUGHT
    homes = packages_distributions()
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imported_at_once(ast.parse(path.read_text()).body):
            if name in sys.stdlib_module_names or name in own:
                continue
            if not {normal(home) for home in homes.get(name, [])} & allowed:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == [], wrong


def test_an_extra_that_is_imported_at_once_is_found() -> None:
    code = (
        "import os\nfrom lm_eval.models import x\n"
        "def f():\n    import trl\n"
        "if TYPE_CHECKING:\n    import vllm\n"
    )
    assert list(imported_at_once(ast.parse(code).body)) == ["os", "lm_eval"]
