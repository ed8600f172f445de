"""Fixtures for all tests. The models and batches themselves are made in `tiny_models.py`."""

import pytest
import torch
from transformers import PreTrainedModel

from helpers.tiny_models import MODELS


@pytest.fixture(params=sorted(MODELS))
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each architecture, tied and untied, in turn."""
    return MODELS[request.param]()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache; subprocesses inherit it."""
    monkeypatch.setenv("RCPO_CACHE", str(tmp_path_factory.mktemp("cache")))
