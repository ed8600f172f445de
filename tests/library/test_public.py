"""What `import rcpo` gives: the documented names, typed, and nothing heavy before one is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rcpo

SOURCE = ast.parse(Path(rcpo.__file__).read_text())


def test_importing_rcpo_imports_nothing_heavy() -> None:
    code = (
        "import sys, rcpo; dir(rcpo); rcpo.UserError; rcpo.open_run\n"
        "print([name for name in ('torch', 'transformers', 'pandas', 'hydra') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("name", rcpo.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    assert name in dir(rcpo)
    value = getattr(rcpo, name)
    assert value is getattr(rcpo, name)
    assert isinstance(value, str) or value.__doc__


def test_type_checkers_see_the_names_of_all() -> None:
    """Those that are imported for types alone, and the version, are the names of `__all__`."""
    block = next(node for node in SOURCE.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"__version__"} == set(rcpo.__all__)
    assert (Path(rcpo.__file__).parent / "py.typed").is_file()


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'rcpo' has no attribute 'trian'"):
        rcpo.trian  # type: ignore[attr-defined]  # noqa: B018


def test_the_design_pages_api_is_kept() -> None:
    """`rcpo.incentives.incentives(objective, pair)` and `rcpo.objectives.load_objective`, as modules too."""
    import torch

    import rcpo.incentives
    import rcpo.objectives

    pair = rcpo.objectives.PairLogProbs(*(torch.zeros(1) for _ in range(4)), torch.ones(1), torch.ones(1))
    d_w, d_l = rcpo.incentives.incentives(rcpo.objectives.load_objective("dpo", beta=0.4), pair)
    assert d_w.item() == pytest.approx(0.2)
    assert d_l.item() == pytest.approx(0.2)
