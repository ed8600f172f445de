"""Fixtures and hooks for all tests: seeds and caches, the fork server's life, and what was not run."""

import itertools
from collections import Counter

import pytest
import torch
from transformers import PreTrainedModel

from helpers import forked, tools
from helpers.tiny_models import MODELS

FORKING = ("trainings", "processes")
"""Folders whose tests ask the fork server."""
NUMBERS = itertools.count()


@pytest.fixture(params=sorted(MODELS))
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each architecture, tied and untied, in turn."""
    return MODELS[request.param]()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("caches"))


@pytest.fixture(autouse=True)
def cache_of_its_own(caches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache; subprocesses inherit it."""
    monkeypatch.setenv("RCPO_CACHE", f"{caches}/{next(NUMBERS)}")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu" and not torch.cuda.is_available():
        pytest.exit("no CUDA device here, and tests of the kind gpu need one", returncode=2)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the fork server import its libraries while the first tests run."""
    will_run = not session.config.option.collectonly
    if will_run and any(item.path.parent.name in FORKING for item in session.items):
        forked.server()


def pytest_sessionfinish() -> None:
    forked.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that lacks its tool fails, with what to install."""
    for mark in item.iter_markers("ci"):
        if "needs" in mark.kwargs and (fault := tools.missing(mark.kwargs["needs"])):
            pytest.fail(fault, pytrace=False)


NOT_RUN = pytest.StashKey[Counter[str]]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        counts = item.config.stash.setdefault(NOT_RUN, Counter())
        if (mark := item.get_closest_marker("ci")) is not None:
            counts[mark.args[0]] += 1
        elif item.get_closest_marker("gpu") is not None:
            counts["gpu"] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line on what was left out, and the command for it."""
    counts = config.stash.get(NOT_RUN, Counter())
    of_gpu = counts.pop("gpu", 0)
    if counts and "ci" not in config.option.markexpr.replace("not ci", ""):
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
        terminalreporter.write_line(f"not run: {counts.total()} tests ({kinds}); they run with: pytest -m ci")
    if of_gpu and config.option.markexpr != "ci":
        terminalreporter.write_line(f"not run: {of_gpu} tests that need a GPU; they run with: pytest -m gpu")
