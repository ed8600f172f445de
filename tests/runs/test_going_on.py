"""What a killed, a finished or a stopped run is told and asked: lost, from an earlier checkpoint, status and
cancel of one run."""

import json
import platform
from pathlib import Path

import pytest
import yaml

from rcpo.cli import dispatch
from rcpo.commands.parser import command_parser
from rcpo.common.errors import UserError
from rcpo.common.locks import hold, run_lock
from rcpo.comparison.load import load_run, read_status
from rcpo.report.live import LiveRun
from rcpo.runs.folder import RunFolder
from rcpo.runs.go_back import put_back, set_newer_aside


def a_run(path: Path, status: str = "running", **holder: object) -> RunFolder:
    """A folder of a run, whose lock was last held as `holder` says."""
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump({"train": {"steps": 10, "epochs": None}}))
    run.run_json.write_text(json.dumps({"status": status}))
    run.metrics.write_text('{"step": 3, "train/loss": 0.5, "speed/step_seconds": 2.0}\n')
    if holder:
        run_lock(path).write_text(json.dumps(holder))
    return run


def test_a_killed_run_is_lost_in_watch_and_compare(tmp_path: Path) -> None:
    """It is where this machine's process held the lock last and none does; of others nothing is known."""
    here = a_run(tmp_path / "here", pid=1, host=platform.node())
    elsewhere = a_run(tmp_path / "elsewhere", pid=1, host="another")
    unknown = a_run(tmp_path / "unknown")
    assert read_status(here.run_json) == ("lost", "lost: nothing runs it any more")
    assert load_run(here.path).status == "lost"
    live = LiveRun(here.path)
    live.look()
    assert (live.status, live.has_ended, live.trouble) == ("lost", True, "lost: nothing runs it any more")
    assert [read_status(run.run_json)[0] for run in (elsewhere, unknown)] == ["running", "running"]
    with hold(run_lock(here.path)):
        assert read_status(here.run_json)[0] == "running"


def test_status_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "mine")
    assert dispatch(["status", str(run.path)]) == 0
    assert "| mine | lost  | 3/10 |" in capsys.readouterr().out
    with hold(run_lock(run.path)):
        assert dispatch(["status", str(run.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["state"], told["eta_seconds"]) == ("mine", "running", 14.0)
    assert told["run"] == str(run.path)


def test_cancel_of_a_run_that_nothing_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "mine")
    assert dispatch(["cancel", str(run.path)]) == 0
    assert capsys.readouterr().out == "nothing trains this run\n"


def test_words_of_resume() -> None:
    options = command_parser("resume").parse(["RUN", "train.steps=300", "--from", "step-000100"])
    assert (options.path, options.changes, options.step) == ("RUN", ["train.steps=300"], "step-000100")
    with pytest.raises(UserError, match=r"b: is no KEY=VALUE; resume one folder at a time"):
        dispatch(["resume", "a", "b"])


def test_a_finished_run_names_what_trains_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path / "mine", "done")
    monkeypatch.setattr("rcpo.runs.frozen.open_run", lambda path: (run, None))
    assert dispatch(["resume", str(run.path)]) == 0
    assert f"type rcpo resume {run.path} --allow-change train.steps=N\n" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["100", "step-000100"])
def test_newer_checkpoints_are_set_aside(tmp_path: Path, step: str) -> None:
    run = a_run(tmp_path / "mine")
    for number in (50, 100, 150):
        (run.checkpoints / f"step-{number:06d}").mkdir(parents=True)
        (run.checkpoints / f"step-{number:06d}/manifest.json").write_text("{}")
    (run.checkpoints / "aside-step-000150-0").mkdir()
    newer, place = run.checkpoints / "step-000150", run.checkpoints / "aside-step-000150-1"
    before = set(run.checkpoints.iterdir())
    moved = set_newer_aside(run, step)
    assert moved == {newer: place}
    put_back(moved)
    assert set(run.checkpoints.iterdir()) == before
    set_newer_aside(run, step)
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == ["step-000050", "step-000100"]
    with pytest.raises(UserError) as caught:
        set_newer_aside(run, "70")
    assert str(caught.value) == (
        f"--from 70: {run.path} has no such checkpoint; there are step-000050, step-000100; type one"
    )
