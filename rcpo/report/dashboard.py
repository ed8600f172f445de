"""W&B pages for a project of runs: a workspace of line plots, and a report with the table of the grid.

Owns what they show. Built with wandb-workspaces, whose classes check every field; `as_spec` gives what would
be sent. Sends nothing by itself: `rcpo.commands.dashboard` does.
"""

import json
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from rcpo.common.errors import UserError
from rcpo.monitor.wandb_media import PAIRS_PLOT

if TYPE_CHECKING:
    from wandb_workspaces.reports import v2 as reports
    from wandb_workspaces.workspaces import Workspace

    from rcpo.comparison.from_wandb import Address


class Plot(NamedTuple):
    """One panel: keys of a run's metrics over the optimizer steps."""

    title: str
    keys: tuple[str, ...]
    unit: str
    """Of the y axis."""


SECTIONS: dict[str, tuple[Plot, ...]] = {
    "Displacement": (
        Plot("Held out: chosen", ("eval/displacement/chosen",), "nats"),
        Plot("Held out: rejected", ("eval/displacement/rejected",), "nats"),
        Plot("Held out: margin", ("eval/displacement/margin",), "nats"),
        Plot("Held out: accuracy", ("eval/displacement/accuracy",), "share of pairs"),
        Plot("Held out: chosen fell", ("eval/displacement/chosen_down",), "share of pairs"),
        Plot("Training batch", ("displacement/chosen", "displacement/rejected"), "nats"),
    ),
    "Band": (
        Plot("Position and band", ("band/position", "band/center", "band/lower", "band/upper"), "log ratio"),
        Plot("Slack: inside where it is not negative", ("band/slack",), "log ratio"),
        Plot("Inside", ("band/inside",), "share of steps"),
        Plot("Cosine of the two sides", ("score/cosine",), "cosine"),
        Plot("Pathway: 0 chosen up, rejected down; 1 both up; 2 both down; 3 the reverse of 0",
             ("dynamics/pathway",), "pathway"),
        Plot("First-order change", ("dynamics/chosen_rate", "dynamics/rejected_rate"), "nats per lr"),
    ),
    "Calibration": (
        Plot("alpha", ("calibration/alpha",), "factor"),
        Plot("Moving averages", ("calibration/position_ema", "calibration/center_ema"), "log ratio"),
        Plot("Steps not used, limits hit", ("calibration/skipped", "calibration/clamped"), "steps"),
    ),
    "Incentives": (
        Plot("Mean incentives", ("incentive/chosen", "incentive/rejected"), "per nat"),
        Plot("Log of their ratio", ("incentive/log_ratio",), "log ratio"),
        Plot("Norms of the two sides", ("score/chosen_norm", "score/rejected_norm"), "norm"),
        Plot("Loss: training batch, held out", ("train/loss", "eval/loss"), "loss"),
    ),
    "Speed": (
        Plot("Pairs", ("speed/pairs_per_second",), "pairs per second"),
        Plot("Tokens", ("speed/tokens_per_second",), "tokens per second"),
        Plot("A step", ("speed/step_seconds",), "seconds"),
        Plot("Peak memory of a rank", ("speed/peak_memory_gb",), "GB"),
    ),
}  # fmt: skip
GROUPS = ("objective.name", "calibration.name")
"""Settings by which runs are grouped; lines are means over a group's runs, shaded by their standard error."""
SUMMARY = ("end_chosen", "end_rejected", "end_margin", "end_accuracy", "end_chosen_down", "worst_chosen",
           "in_band_share", "alpha", "pairs_per_second")  # fmt: skip
"""Numbers of a run's summary: columns of the run table."""
MAX_RUNS = 100
"""Groups that a panel draws at most."""
ABOUT = (
    "Change of the log-probability of chosen and rejected responses on held-out pairs, against the model "
    "before training, for every objective and calibration. Lines are means over runs with their standard "
    "error."
)


def line_plot(plot: Plot) -> "reports.LinePlot":
    from wandb_workspaces.reports import v2 as reports

    return reports.LinePlot(
        title=plot.title,
        x="Step",
        y=list(plot.keys),
        title_x="optimizer step",
        title_y=plot.unit,
        groupby_aggfunc="mean",
        groupby_rangefunc="stderr",
        max_runs_to_show=MAX_RUNS,
    )


def pairs_plot() -> "reports.CustomChart":
    """The scatter plot that every run has sent of its held-out pairs."""
    from wandb_workspaces.reports import v2 as reports

    chart = reports.CustomChart.from_table(
        f"{PAIRS_PLOT}_table",
        chart_fields={"x": "rejected_change", "y": "chosen_change"},
        chart_strings={"title": "Held-out pairs: change of log-probability, nats"},
    )
    chart.chart_name = "wandb/scatter/v0"
    return chart


def make_workspace(address: "Address") -> "Workspace":
    """Five sections of panels, runs grouped by objective and calibration."""
    from wandb_workspaces import workspaces

    sections = []
    for name, plots in SECTIONS.items():
        panels = [line_plot(plot) for plot in plots] + ([pairs_plot()] if name == "Displacement" else [])
        sections.append(workspaces.Section(name=name, panels=panels, is_open=True))
    return workspaces.Workspace(
        entity=address.entity,
        project=address.project,
        name=f"rcpo {address.group or 'displacement'}",
        sections=sections,
        settings=workspaces.WorkspaceSettings(max_runs=MAX_RUNS),
        runset_settings=workspaces.RunsetSettings(
            filters=group_filter(address),
            groupby=[workspaces.Config(name) for name in GROUPS],
            pinned_columns=pinned_columns(),
        ),
    )


def group_filter(address: "Address") -> Any:
    """Runs of the address's group, all where it names none."""
    from wandb_workspaces import expr

    return "" if address.group is None else expr.And(expr.Metric("Group") == address.group)


def pinned_columns() -> list[str]:
    return ["run:displayName", *(f"summary:summary/{name}" for name in SUMMARY)]


def make_report(address: "Address", table: str | None, *, is_saved: bool) -> "reports.Report":
    """A page to read: `table` (of `rcpo compare`, Markdown), then the same runs live, as bars, lines and a
    run table grouped by objective and calibration.

    Where `is_saved`, the library looks up the project, which must be there; else nothing is asked of W&B.
    """
    from wandb_workspaces.reports import v2 as reports

    place = {"entity": address.entity, "project": address.project} if is_saved else {}
    runs = reports.Runset(
        name="by objective and calibration",
        filters=group_filter(address),
        groupby=[f"config.{name}" for name in GROUPS],
        pinned_columns=pinned_columns(),
        **place,
    )
    grid = [] if table is None else [reports.H2("Grid"), reports.MarkdownBlock(table)]
    return reports.Report(
        entity=address.entity,
        project=address.project,
        title=f"rcpo: {address.group or 'displacement and calibration'}"[:128],
        description="Likelihood displacement with and without reward calibration",
        width="fluid",
        blocks=[
            reports.P(ABOUT),
            *grid,
            reports.H2("Runs"),
            reports.PanelGrid(runsets=[runs], panels=_report_panels()),
        ],
    )


def _report_panels() -> list[Any]:
    """Bars of the ends, then the first lines of every section; the library puts them beside each other."""
    from wandb_workspaces.reports import v2 as reports

    ends = [
        ("end_chosen", "Chosen at the end", "nats"),
        ("end_rejected", "Rejected at the end", "nats"),
        ("end_chosen_down", "Chosen fell", "share of pairs"),
    ]
    bars = [
        reports.BarPlot(
            title=title,
            metrics=[f"summary/{name}"],
            title_x=unit,
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
            max_bars_to_show=MAX_RUNS,
        )
        for name, title, unit in ends
    ]
    return bars + [line_plot(plot) for plots in SECTIONS.values() for plot in plots[:3]]


def is_report(url: str, address: "Address") -> bool:
    """Whether the URL is that of a report of the address's project, or of a workspace there. Raises UserError
    for any other."""
    parts = urlsplit(url)
    path = parts.path.strip("/").split("/")
    if path[:2] == [address.entity, address.project]:
        if len(path) == 4 and path[2] == "reports" and "--" in path[3]:
            return True
        if len(path) == 2 and "nw" in parse_qs(parts.query):
            return False
    raise UserError(
        f"--update {url}: is no workspace or report of {address.entity}/{address.project}; give the URL that "
        "rcpo dashboard printed"
    )


def remade(url: str, page: "Workspace | reports.Report") -> "Workspace | reports.Report":
    """What W&B has at the URL, of the same kind as `page`, with that one's contents; it keeps its name. The
    library raises what it likes where there is none."""
    there = type(page).from_url(url)
    contents = ("blocks", "description", "width") if hasattr(page, "blocks") else CONTENTS
    for name in contents:
        setattr(there, name, getattr(page, name))
    return there


CONTENTS = ("sections", "settings", "runset_settings")
"""Of a workspace: all but its name."""


def as_spec(page: "Workspace | reports.Report") -> dict[str, Any]:
    """What W&B would be sent, as the library writes it: plain containers."""
    model = page._to_model()  # the library has no public way to see a page without sending it
    spec: dict[str, Any] = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    return spec
