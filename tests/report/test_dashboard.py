"""`rcpo dashboard`: what it would send, checked with the library's own schema, and sent to a server on this
machine by the library itself."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb_workspaces import workspaces
from wandb_workspaces.reports.v2 import internal as report_schema
from wandb_workspaces.reports.v2.interface import Report
from wandb_workspaces.workspaces import internal as workspace_schema

from helpers.compare_folders import make_run
from helpers.wandb_server import KEY, Server, serve, stored
from rcpo import cli
from rcpo.report.dashboard import SECTIONS

REJECTED = (-2.0, -2.0, -2.0, -2.0)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    make_run(folder / "dpo-off", "dpo", "off")
    make_run(folder / "dpo-on", "dpo", "on", change=((0.5, 1.0, 2.0, 0.0), REJECTED))
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(grid: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The project team/grid with the two runs, and an account for it."""
    made = Server([stored(path, "main") for path in sorted(grid.iterdir())])
    with serve(made):
        monkeypatch.setenv("WANDB_BASE_URL", made.base)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield made
    wandb.teardown()


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.dispatch(["dashboard", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The line that a user reads."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["dashboard", *words])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    return said.err


def keys_of(section: dict[str, Any]) -> list[str]:
    """The metrics that the line plots of a section draw."""
    return [key for panel in section["panels"] for key in panel["config"].get("metrics", [])]


def test_the_workspace_has_the_five_sections_and_groups_by_objective_and_calibration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = json.loads(typed(capsys, "team/grid", "--print"))["workspace"]
    assert (printed["entity"], printed["project"]) == ("team", "grid")
    section = printed["spec"]["section"]
    sections = {found["name"]: keys_of(found) for found in section["panelBankConfig"]["sections"]}
    assert list(sections) == ["Displacement", "Band", "Calibration", "Incentives", "Speed"]
    assert "eval/displacement/chosen" in sections["Displacement"]
    assert {"band/position", "band/lower", "band/upper"} <= set(sections["Band"])
    (runs,) = section["runSets"]
    assert runs["grouping"] == [
        {"section": "config", "name": "objective.value.name"},
        {"section": "config", "name": "calibration.value.name"},
    ]
    assert runs["filters"]["filterFormat"] == "filterV2"


def test_what_is_printed_is_valid_by_the_librarys_schema_and_survives_reading_it_back(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The classes that the library reads W&B's answers with take it, and write the same again."""
    printed = json.loads(typed(capsys, "team/grid/main", str(grid), "--dry-run"))
    view = workspace_schema.View.model_validate(printed["workspace"])
    again = workspaces.Workspace._from_model(view)._to_model()
    assert [section.name for section in again.spec.section.panel_bank_config.sections] == list(SECTIONS)
    panels = [panel for section in again.spec.section.panel_bank_config.sections for panel in section.panels]
    assert {type(panel).__name__ for panel in panels} == {"LinePlot", "Vega2"}
    report = Report._from_model(report_schema.ReportViewspec.model_validate(printed["report"]))
    kinds = [type(block).__name__ for block in report.blocks]
    assert kinds == ["P", "H2", "MarkdownBlock", "H2", "PanelGrid"]
    assert {type(panel).__name__ for panel in report.blocks[-1].panels} == {"BarPlot", "LinePlot"}
    assert len({(panel.layout.x, panel.layout.y) for panel in report.blocks[-1].panels}) == len(
        report.blocks[-1].panels
    )


def test_a_group_shows_its_runs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(typed(capsys, "team/grid/main", "--print"))
    for spec in (printed["workspace"]["spec"]["section"]["runSets"], _run_sets(printed["report"])):
        assert [_filters(run_set["filters"]) for run_set in spec] == [[("group", "main")]]


def _run_sets(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        run_set for block in report["spec"]["blocks"] if block["type"] == "panel-grid"
        for run_set in block["metadata"]["runSets"]
    ]  # fmt: skip


def _filters(tree: Any) -> list[tuple[str, Any]]:
    """(name, value) of every comparison in a tree of filters."""
    if isinstance(tree, list):
        return [found for item in tree for found in _filters(item)]
    if not isinstance(tree, dict):
        return []
    own = [(tree["key"]["name"], tree["value"])] if "key" in tree and "value" in tree else []
    return own + [found for item in tree.values() for found in _filters(item)]


def test_without_an_account_the_table_can_come_from_folders(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chosen (-1, 1, 2, -4) without and (0.5, 1, 2, 0) with calibration: means -0.5 and 0.875."""
    printed = json.loads(typed(capsys, "team/grid", "--print", str(grid)))
    (table,) = [
        block["content"] for block in printed["report"]["spec"]["blocks"] if block["type"] == "markdown-block"
    ]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| dpo")]
    assert [(row[3].strip(), row[5].strip()) for row in rows] == [("off", "-0.50"), ("on", "+0.88")]


def test_both_pages_are_saved_with_the_table_of_the_runs_that_wandb_has(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    out = typed(capsys, "team/grid/main")
    workspace, report = server.saved
    assert (workspace["type"], report["type"]) == ("project-view", "runs")
    assert {(page["entityName"], page["projectName"]) for page in server.saved} == {("team", "grid")}
    printed = json.loads(typed(capsys, "team/grid/main", "--print"))["workspace"]["spec"]["section"]
    sent = json.loads(workspace["spec"])["section"]["panelBankConfig"]["sections"]
    assert [keys_of(section) for section in sent] == [
        keys_of(section) for section in printed["panelBankConfig"]["sections"]
    ]
    spec = json.loads(report["spec"])
    (table,) = [block["content"] for block in spec["blocks"] if block["type"] == "markdown-block"]
    assert "| dpo       | on" in table
    (runs,) = _run_sets({"spec": spec})
    assert runs["project"]["name"] == "grid"
    assert [line.split(": ")[0] for line in out.splitlines()] == ["workspace", "report"]
    assert all("/team/grid" in line for line in out.splitlines())


def test_pages_are_remade_in_place_by_their_urls(
    server: Server, grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Renamed in W&B and with other contents; then remade for another group, with the table of folders."""
    urls = [line.split(": ", 1)[1] for line in typed(capsys, "team/grid/main").splitlines()]
    before = {key: dict(view) for key, view in server.views.items()}
    for view in server.views.values():
        view["displayName"] = "mine"
    (workspace,) = [view for view in server.views.values() if view["type"] == "project-view"]
    spec = json.loads(workspace["spec"])
    spec["section"]["panelBankConfig"]["sections"][0]["name"] = "Old"
    workspace["spec"] = json.dumps(spec)
    updates = [word for url in urls for word in ("--update", url)]
    out = typed(capsys, "team/grid/other", str(grid / "dpo-on"), *updates)
    assert [line.split(": ")[0] for line in out.splitlines()] == ["workspace", "report"]
    assert server.views.keys() == before.keys()
    for key, view in server.views.items():
        assert view["displayName"] == "mine"
        assert "other" in view["spec"]
        assert '"main"' not in view["spec"]
        assert '"Old"' not in view["spec"]
        assert ("| dpo" in view["spec"]) == (view["type"] == "runs")
        assert '"main"' in before[key]["spec"]
    assert urls[0] in out
    assert typed(capsys, "team/grid", "--update", urls[0]) == f"workspace: {urls[0]}\n"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://wandb.ai/team/grid", "is no workspace or report of team/grid; give the URL that"),
        ("https://wandb.ai/team/elsewhere?nw=abc", "is no workspace or report of team/grid"),
        ("{base}/team/grid?nw=abc", "W&B did not answer as it should (Workspace `abc` not found"),
        ("{base}/team/grid/reports/Mine--VmlldzoxMjM", "W&B has no such page"),
        ("{base}/team/grid/reports/Mine--x", "W&B"),
        ("grid", "is no workspace or report of team/grid"),
    ],
)
def test_a_page_that_is_not_there_is_not_remade(
    server: Server, grid: Path, capsys: pytest.CaptureFixture[str], url: str, said: str
) -> None:
    assert said in refused(capsys, "team/grid", str(grid), "--update", url.format(base=server.base))
    assert server.saved == []


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], server: Server) -> None:
    assert "grid: is no address in W&B; type ENTITY/PROJECT" in refused(capsys, "grid")
    assert "unrecognized arguments: --wrong; `rcpo dashboard" in refused(capsys, "team/grid", "--wrong")
    assert "W&B did not answer as it should" in refused(capsys, "team/elsewhere")
    page = ["--update", f"{server.base}/team/grid?nw=abc"]
    assert "--update: not allowed with argument --print" in refused(capsys, "team/grid", "--print", *page)
    assert "--update: one workspace and one report at most" in refused(capsys, "team/grid", *page, *page)
    assert server.saved == []


def test_without_an_account_it_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no API key of W&B is configured; type `wandb login`" in refused(capsys, "team/grid")


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "wandb_workspaces":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from rcpo import cli
cli.main(["dashboard", "team/grid", "--print"])
"""


def test_without_the_library_it_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rcpo: dashboard needs wandb-workspaces; type pip install 'rcpo[dashboard]'\n"
