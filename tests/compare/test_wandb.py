"""`rcpo compare --wandb`: W&B's own client reads from a server on this machine; the same groups as
folders."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import wandb

from helpers.compare_folders import make_run
from helpers.wandb_server import KEY, Server, StoredRun, serve, stored
from rcpo import cli
from rcpo.common.errors import UserError
from rcpo.comparison.from_wandb import Fetched, as_run, parse_address
from rcpo.comparison.load import load_run

REJECTED = (-2.0, -2.0, -2.0, -2.0)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of dpo without and with calibration, and one that failed."""
    folder = tmp_path_factory.mktemp("grid")
    for seed in (0, 1):
        make_run(folder / f"dpo-off-{seed}", "dpo", "off", seed)
        make_run(folder / f"dpo-on-{seed}", "dpo", "on", seed, change=((0.5, 1.0, 2.0, seed), REJECTED))
    make_run(folder / "ipo-on-0", "ipo", "on", status="failed")
    return folder


@pytest.fixture(scope="module")
def server(grid: Path) -> Iterator[Server]:
    """The grid, of which ipo is in a group of its own, and a run that somebody else's program made."""
    groups = {"dpo": "main", "ipo": "other"}
    runs = [stored(path, groups[path.name[:3]]) for path in sorted(grid.iterdir())]
    runs[0].is_exported = True
    theirs = StoredRun("theirs", None, "finished", {"lr": 1.0}, history=['{"_step": 0, "loss": 1.0}'])
    made = Server([*runs, theirs])
    with serve(made):
        yield made
    wandb.teardown()


@pytest.fixture(autouse=True)
def account(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", server.base)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.dispatch(["compare", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The line that a user reads."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *words])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    return said.err


def test_a_project_gives_the_same_table_as_the_folders(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every number of every group, the paired differences to off among them; band edges are infinite at odd
    steps."""
    from_wandb = list(csv.DictReader(io.StringIO(typed(capsys, "--wandb", "team/grid", "--csv"))))
    from_folders = list(csv.DictReader(io.StringIO(typed(capsys, str(grid), "--csv"))))
    assert [(row["objective"], row["calibration"]) for row in from_wandb] == [
        ("dpo", "off"), ("dpo", "on"), ("ipo", "on"),
    ]  # fmt: skip
    assert float(from_wandb[1]["vs_off_chosen"]) == pytest.approx(1.5)
    assert from_wandb[1]["in_band"] != ""
    for mine, its in zip(from_wandb, from_folders, strict=True):
        for key, value in its.items():
            try:
                assert float(mine[key]) == pytest.approx(float(value), rel=1e-6), key
            except ValueError:
                assert mine[key] == value, key


def test_a_group_is_read_alone(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(typed(capsys, "--wandb", "team/grid/main", "--json"))
    assert sorted(name for group in found["cells"] for name in group["runs"]) == [
        f"team/grid/dpo-{calibration}-{seed}" for calibration in ("off", "on") for seed in (0, 1)
    ]
    assert found["left_out"] == []


def test_runs_of_others_and_runs_that_did_not_end_well_are_named_and_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = json.loads(typed(capsys, "--wandb", "team/grid", "--json"))
    assert {item["path"]: item["reason"] for item in found["left_out"]} == {
        "team/grid/theirs": "was not made by rcpo",
        "team/grid/ipo-on-0": "failed in W&B",
    }


def test_the_report_is_written_from_wandb_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    typed(capsys, "--wandb", "team/grid/main", "--html", str(page))
    assert page.stat().st_size > 100_000


def test_what_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "team/elsewhere: W&B did not answer as it should (Could not find project elsewhere" in refused(
        capsys, "--wandb", "team/elsewhere"
    )
    assert "team/grid: has no runs of group nobody in W&B" in refused(capsys, "--wandb", "team/grid/nobody")
    assert "not allowed with PATH" in refused(capsys, "folder", "--wandb", "team/grid")


def test_without_a_key_nothing_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    assert "no API key of W&B is configured; type `wandb login`" in refused(capsys, "--wandb", "team/grid")


@pytest.mark.parametrize("word", ["team", "team/", "/grid", "team/grid/", "https://wandb.ai/team/grid", ""])
def test_another_word_is_no_address(word: str) -> None:
    with pytest.raises(UserError, match="is no address in W&B; type ENTITY/PROJECT"):
        parse_address(word)
    assert parse_address("team/grid/a/b") == ("team", "grid", "a/b")


def test_a_run_of_which_wandb_lost_the_end_is_left_out(grid: Path) -> None:
    """The run went on without W&B after step 4, or W&B has no summary of it yet."""
    whole = stored(grid / "dpo-off-0")
    rows = [json.loads(row) for row in whole.history]
    for history, summary, reason in (
        (rows, whole.summary, None),
        (rows[:5], whole.summary, "W&B has its evaluations to step 4 of 8 only"),
        (rows, {}, "W&B has no summary of it"),
    ):
        fetched = Fetched("team/grid/x", "finished", whole.config, summary, history, None)
        assert as_run(fetched).problem == reason


def test_the_curves_are_those_of_the_folder_with_what_is_not_finite(grid: Path) -> None:
    """W&B writes infinities as text; the band's edges are infinite at odd steps."""
    whole, folder = stored(grid / "dpo-on-0"), load_run(grid / "dpo-on-0")
    rows = [json.loads(row) for row in whole.history]
    run = as_run(Fetched("team/grid/x", "finished", whole.config, whole.summary, rows, None))
    assert np.isinf(folder.curves["band/upper"]).sum() == 4
    for mine, its in ((run.curves, folder.curves), (run.evals, folder.evals)):
        assert sorted(mine) == sorted(its)
        for name, values in its.items():
            assert np.array_equal(mine[name], values, equal_nan=True), name


def test_a_table_that_is_not_rcpos_is_a_reason() -> None:
    config = {"objective": {"name": "dpo"}, "calibration": {"name": "off"}}
    for table in ({"columns": ["a"], "data": []}, {"rows": 1}, {"columns": [], "data": [[1]]}):
        run = as_run(Fetched("team/grid/x", "finished", config, {}, [], table))
        assert run.problem == "the table of held-out pairs in W&B is not rcpo's"
