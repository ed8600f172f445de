"""A disk that is full while RUN/best is written: the older weights stay, and the run goes on or ends with one
line."""

import errno
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rcpo.common.errors import SaveError
from rcpo.runs.folder import RunFolder
from rcpo.training import after_evaluation
from rcpo.training.after_evaluation import _keep_if_best


def full_disk(model: Any, weights: Any, tokenizer: Any, place: Path) -> None:
    """As `save_model`, until the disk is full."""
    place.mkdir()
    (place / "config.json").write_text("{")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("on_save_error", ["continue", "stop"])
def test_the_older_best_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, on_save_error: str
) -> None:
    """Step 2 is better than step 1, whose weights are kept; nothing half-made is left beside them."""
    run = RunFolder(tmp_path / "run")
    run.best.mkdir(parents=True)
    (run.best / "model.safetensors").write_text("of step 1")
    known = {"best": {"step": 1, "key": "eval/loss", "value": 0.5}}
    run.run_json.write_text(json.dumps(known))
    rows = [
        {"step": step, "loss": loss, "displacement/chosen": 0.0}
        for step, loss in ((0, 0.7), (1, 0.5), (2, 0.4))
    ]
    run.eval.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.metrics.write_text("")
    train = SimpleNamespace(keep_best="eval/loss", on_save_error=on_save_error)
    engine = SimpleNamespace(whole_weights=dict, policy=SimpleNamespace(model=None))
    training: Any = SimpleNamespace(
        config=SimpleNamespace(train=train), run=run, engine=engine, state=SimpleNamespace(step=2),
        inputs=SimpleNamespace(tokenizer=None),
    )  # fmt: skip
    monkeypatch.setattr(after_evaluation, "save_model", full_disk)
    line = f"{run.best}: the weights of step 2 could not be written (No space left on device); the older stay"
    if on_save_error == "stop":
        with pytest.raises(SaveError) as caught:
            _keep_if_best(training)
        assert str(caught.value) == line
    else:
        with caplog.at_level(logging.WARNING):
            _keep_if_best(training)
        assert caplog.messages == [f"{line}, and the run goes on (train.on_save_error=continue)"]
    assert sorted(path.name for path in run.path.iterdir()) == [
        "best",
        "eval.jsonl",
        "metrics.jsonl",
        "run.json",
    ]
    assert [path.read_text() for path in run.best.iterdir()] == ["of step 1"]
    assert run.read_run() == known
