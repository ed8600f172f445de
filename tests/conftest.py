"""Fixtures and hooks for all tests: seeds and caches, the order of files, the fork server's life, and what
was not run. The process that only hands files to workers imports this one too: no torch at its top."""

import itertools
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from helpers import forked, tools

if TYPE_CHECKING:
    from transformers import PreTrainedModel

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Before torch is imported: a fork of a process with a pool of threads may wait for them for ever."""
FORKING = ("processes", "trainings")
"""Folders whose tests ask the fork server."""
ORDER = {name: number for number, name in enumerate(("ci", "method", *FORKING))}
NUMBERS = itertools.count()
NOT_RUN = pytest.StashKey[Counter[str]]()


@pytest.fixture(params=["llama", "llama-tied", "neox", "neox-tied"])
def tiny_model(request: pytest.FixtureRequest) -> "PreTrainedModel":
    """Each architecture, tied and untied, in turn."""
    from helpers.tiny_models import MODELS

    return MODELS[request.param]()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("caches"))


@pytest.fixture(autouse=True)
def cache_of_its_own(caches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache; subprocesses inherit it."""
    monkeypatch.setenv("RCPO_CACHE", f"{caches}/{next(NUMBERS)}")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu":
        import torch

        if os.environ.get("RCPO_GPU_TESTS_ON") != "cpu" and not torch.cuda.is_available():
            pytest.exit(
                "no CUDA device here, and tests of the kind gpu need it; RCPO_GPU_TESTS_ON=cpu rehearses",
                returncode=2,
            )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take or wait long come early, so that no worker is left with one at the end; before those
    that fork, something to do while the fork server imports its libraries."""
    items.sort(key=lambda item: ORDER.get(item.path.parent.name, len(ORDER)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the fork server import its libraries while the first tests run."""
    will_run = not session.config.option.collectonly
    if will_run and any(item.path.parent.name in FORKING for item in session.items):
        forked.server()


def pytest_sessionfinish(session: pytest.Session) -> None:
    forked.close()
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist; all of them leave out the same
        session.config.workeroutput["not_run"] = dict(session.config.stash.get(NOT_RUN, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker has left out, told to the one that speaks."""
    if hasattr(node, "workeroutput") and "not_run" in node.workeroutput:
        node.config.stash[NOT_RUN] = Counter(node.workeroutput["not_run"])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that lacks its tool fails, with what to install."""
    for mark in item.iter_markers("ci"):
        if "needs" in mark.kwargs and (fault := tools.missing(mark.kwargs["needs"])):
            pytest.fail(fault, pytrace=False)


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
    if config.option.markexpr == "gpu":
        from helpers.device_runs import device_name

        terminalreporter.write_line(f"ran on {device_name()}")
    of_gpu = counts.pop("gpu", 0)
    if counts and "ci" not in config.option.markexpr.replace("not ci", ""):
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
        terminalreporter.write_line(f"not run: {counts.total()} tests ({kinds}); they run with: pytest -m ci")
    if of_gpu and config.option.markexpr != "ci":
        terminalreporter.write_line(f"not run: {of_gpu} tests that need a GPU; they run with: pytest -m gpu")
