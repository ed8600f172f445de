"""Print one Markdown table of a finished sweep, seeds merged: `python tests/helpers/demo_table.py SWEEP`.

SWEEP is a folder that `rcpo sweep` made, of sweeps/demo.yaml say. A script, not a test.
"""

import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rcpo.config.schema import Config
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.sweep.folder import SweepFolder


@dataclass(frozen=True)
class Trained:
    """One cell and its run."""

    axes: dict[str, Any]
    run: RunFolder

    @property
    def group(self) -> tuple[str, ...]:
        """What the seeds of a row of the table have in common."""
        return tuple(str(value) for key, value in self.axes.items() if key != "seed")

    @functools.cached_property
    def config(self) -> Config:
        """As the run was made with."""
        return open_run(str(self.run.path))[1]

    @property
    def status(self) -> str:
        return str(self.run.read_run().get("status", "absent"))


@dataclass(frozen=True)
class Column:
    """One number a run, from its summary and last evaluation, and the rows of metrics.jsonl; shown as `text`
    says."""

    head: str
    value: Callable[[dict[str, Any], list[dict[str, Any]], int], float | None]
    text: Callable[[float], str]
    is_of_some: bool = False
    """Left out where no run has it."""


def of_summary(key: str) -> Callable[[dict[str, Any], list[dict[str, Any]], int], float | None]:
    return lambda summary, rows, every: summary[key]


def of_last(key: str) -> Callable[[dict[str, Any], list[dict[str, Any]], int], float | None]:
    """Of the last evaluation; None for runs that have none."""
    return lambda summary, rows, every: summary.get(key)


def in_band_share(summary: dict[str, Any], rows: list[dict[str, Any]], every: int) -> float | None:
    """Of the steps that every cell measures: some calibrations measure more than those."""
    inside = [
        row["band/inside"]
        for row in rows
        if "band/inside" in row and (int(row["step"]) - 1) % max(1, every) == 0
    ]
    return statistics.fmean(inside) if inside else None


def signed(value: float) -> str:
    return f"{value:+.2f}"


def share(value: float) -> str:
    return f"{100 * value:.0f}"


COLUMNS = (
    Column("chosen (nats)", of_summary("end_chosen"), signed),
    Column("rejected (nats)", of_summary("end_rejected"), signed),
    Column("accuracy", of_summary("end_accuracy"), "{:.2f}".format),
    Column("chosen fell (%)", of_summary("end_chosen_down"), share),
    Column("in band (%)", in_band_share, share),
    Column("last alpha", of_summary("alpha"), "{:.2f}".format),
    *(
        Column(head + against, of_last(f"vision_gain{kind}{side}"), signed, is_of_some=True)
        for against, kind in (("", ""), (", blank", "_blank"))
        for head, side in (
            ("vision gain", ""),
            ("of z_w (nats)", "/chosen"),
            ("of z_l (nats)", "/rejected"),
        )
    ),
)


def table_lines(cells: list[Trained]) -> Iterator[str]:
    """Markdown: mean and, behind +-, standard deviation over the seeds; failed runs are named, not
    averaged."""
    keys = [key for key in cells[0].axes if key != "seed"]
    finished = [cell for cell in cells if cell.status == "done"]
    columns = [each for each in COLUMNS if not each.is_of_some or _cell_text(each, finished) != "-"]
    heads = [*keys, *(column.head for column in columns), "band of"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + " --- |" * len(heads)
    for group, members in itertools.groupby(cells, key=lambda cell: cell.group):
        done = [cell for cell in members if cell.status == "done"]
        texts = [_cell_text(column, done) for column in columns]
        band = done[0].config.calibration if done else None
        texts.append("" if band is None else f"{band.scope}, {band.estimator}")
        yield f"| {' | '.join([*group, *texts])} |"
    for cell in cells:
        if cell.status != "done":
            yield f"\n{cell.run.path.name}: {cell.status}: {cell.run.read_run().get('exit_reason')}"


def _cell_text(column: Column, done: list[Trained]) -> str:
    values = []
    for cell in done:
        every = cell.config.metrics.geometry_every
        summary = cell.run.read_run()["summary"] | cell.run.rows(cell.run.eval)[-1]
        value = column.value(summary, cell.run.rows(cell.run.metrics), every)
        if value is not None:
            values.append(value)
    if not values:
        return "-"
    text = column.text(statistics.fmean(values))
    return text if len(values) == 1 else f"{text} ± {column.text(statistics.stdev(values)).lstrip('+')}"


def main(path: str) -> None:
    sweep = SweepFolder(path)
    cells = [Trained(cell.axes, sweep.run(cell)) for cell in sweep.read_cells()]
    groups = list(dict.fromkeys(cell.group for cell in cells))
    print("\n".join(table_lines(sorted(cells, key=lambda cell: groups.index(cell.group)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
