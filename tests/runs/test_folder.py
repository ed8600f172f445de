"""The run folder's small files: rows with numbers that JSON lacks, damage noticed, and a run that goes on."""

import math
import platform
from pathlib import Path

import pytest

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from rcpo.common.errors import UserError
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.runs.rows import decode_row, encode_row


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_rows_keep_every_float_and_are_json_for_any_reader() -> None:
    """Shortest digits that give the same double back; nan is null, infinities are words."""
    row = {"step": 3, "a": 0.1 + 0.2, "b": math.nan, "c": math.inf, "d": -math.inf, "e": 5e-324}
    line = encode_row(row)
    assert line == ('{"step": 3, "a": 0.30000000000000004, "b": null, "c": "inf", "d": "-inf", "e": 5e-324}')
    back = decode_row(line)
    assert math.isnan(back.pop("b"))
    del row["b"]
    assert back == row


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null"])
def test_damaged_run_json_is_one_line(run: RunFolder, content: bytes) -> None:
    run.run_json.write_bytes(content)
    for read in (run.read_run, run.reopen, lambda: run.update_run(status="done")):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value).startswith(f"{run.run_json}: is damaged; remove it to go on")
    assert run.run_json.read_bytes() == content


def test_a_run_that_goes_on_keeps_its_wandb_id(run: RunFolder) -> None:
    """Status is running again, the reason is gone, the count goes up; without run.json a new id is made."""
    run.update_run(status="failed", exit_reason="x", wandb_id="abc", host="h")
    for count in (1, 2):
        run.reopen()
        assert run.read_run() == {
            "status": "running", "exit_reason": None, "wandb_id": "abc", "host": platform.node(),
            "num_resumed": count,
        }  # fmt: skip
    run.run_json.unlink()
    run.reopen()
    first = run.read_run()["wandb_id"]
    run.reopen()
    assert len(first) == 12
    assert run.read_run()["wandb_id"] == first


def test_frozen_config_comes_back_equal_and_an_existing_folder_is_refused(tmp_path: Path) -> None:
    """YAML and back: the same dataclass, small floats included. A second run of the same name changes
    nothing."""
    write_inputs(tmp_path)
    case = Case("simpo", "on", "llama", "adamw")
    config = make_config(tmp_path, tmp_path / "run", case, Layout(1, 8, 3), "optim.lr=1e-7")
    run = make_run(config)
    assert open_run(str(run.path))[1] == config
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists and is not empty; choose another name="):
        make_run(config)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    state = run.read_run()
    assert (state["status"], state["world_size"]) == ("running", 1)
    assert state["started"].endswith("+00:00")
