"""TensorBoard and Trackio, read back by their own readers; and what is said where a library is not there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rcpo.commands.train import prepare
from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.launch.first_look import look
from rcpo.monitor.other_trackers import TensorBoardSink, TrackioSink, refuse_missing_tracker
from rcpo.monitor.sinks import build_sinks
from rcpo.runs.answers import append_answers
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree


def made(tmp_path: Path, name: str) -> tuple[ResolvedConfig, RunFolder]:
    config = prepare([f"tracking={name}", "name=seen", "train.device=cpu", f"run_dir={tmp_path / 'run'}"])
    assert config is not None
    run = RunFolder(tmp_path / "run")
    run.create(config, config_tree(config))
    return config, run


def rows_to(sink: Any, run: RunFolder, steps: range, scale: float = 1.0) -> None:
    """Steps, an evaluation with an answer at each, and at the end scores and an alert."""
    for step in steps:
        sink.log_step({"step": step, "train/loss": scale * step, "band/upper": float("inf")})
        sink.log_eval({"step": step, "displacement/chosen": -scale * step})
    sink.log_answers(append_answers(run, 0, ["a prompt"], ["an answer"]))
    sink.log_scores(steps[-1], {"arithmetic": scale / 4})
    sink.alert(steps[-1], "falling")
    sink.close({}, 0)


def test_tensorboard_has_every_row_once_also_after_a_resume(tmp_path: Path) -> None:
    """Killed after step 3, resumed from a checkpoint of step 1: 2 and 3 are the second writer's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, run = made(tmp_path, "tensorboard")
    rows_to(TensorBoardSink(config, run, start_step=0), run, range(1, 4))
    rows_to(TensorBoardSink(config, run, start_step=1), run, range(2, 5), scale=2)
    reader = EventAccumulator(str(run.path / "tensorboard")).Reload()
    loss = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert loss == [(1, 1.0), (2, 4.0), (3, 6.0), (4, 8.0)]
    chosen = [(event.step, event.value) for event in reader.Scalars("eval/displacement/chosen")]
    assert chosen == [(1, -1.0), (2, -4.0), (3, -6.0), (4, -8.0)]
    scores = [(event.step, event.value) for event in reader.Scalars("downstream/arithmetic")]
    assert scores == [(4, 0.5)]
    texts = {
        tag: reader.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in reader.Tags()["tensors"]
    }
    assert "an answer" in texts["answers/0/text_summary"]
    assert texts["alert/text_summary"] == "falling"
    assert "name: dpo" in texts["config/text_summary"]


@pytest.mark.ci("Trackio's own reader")
def test_trackio_has_every_row(tmp_path: Path) -> None:
    """In a process of its own: the library reads its folder's place once. Nothing is said on stdout."""
    script = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path\n"
        "from importlib import util\n"
        f"spec = util.spec_from_file_location('t', {str(Path(__file__))!r})\n"
        "t = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(t)\n"
        f"config, run = t.made(Path({str(tmp_path)!r}), 'trackio')\n"
        "t.rows_to(t.TrackioSink(config, 0), run, range(1, 4))\n"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    read = (
        "from trackio.sqlite_storage import SQLiteStorage as s; import json\n"
        "found = s.get_runs('rcpo'), s.get_logs('rcpo', 'seen'), s.get_alerts('rcpo')\n"
        "print(json.dumps(found, default=str))"
    )
    said = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True)
    runs, rows, alerts = json.loads(said.stdout.splitlines()[-1])
    assert runs == ["seen"]
    for key, sign in (("train/loss", 1), ("eval/displacement/chosen", -1)):
        assert [(row["step"], row[key]) for row in rows if key in row] == [
            (step, sign * step) for step in (1, 2, 3)
        ]
    assert [alert["text"] for alert in alerts] == ["falling"]


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_library_that_is_not_there_is_one_line_before_anything_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each: None if each == name else found(each))
    from rcpo.config.compose import compose

    tree = compose([f"tracking={name}"])
    assert tree is not None
    with pytest.raises(UserError) as caught:
        look(tree, overwrite=False)
    line = f"tracking={name}: needs the {name} package; type pip install 'rcpo[{name}]', or tracking=none"
    assert str(caught.value) == line
    for other in {"wandb", "none", "tensorboard", "trackio"} - {name}:
        refuse_missing_tracker(other)


def test_a_tracker_that_fails_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = made(tmp_path, "trackio")
    monkeypatch.setitem(sys.modules, "trackio", None)
    sinks = build_sinks(config, run, num_steps=3, start_step=0)
    (sink,) = (sink for sink in sinks if isinstance(sink, TrackioSink))
    rows_to(sink, run, range(1, 4))
    for other in sinks:
        if other is not sink:
            other.close({}, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Trackio failed (ModuleNotFoundError" in caplog.text
