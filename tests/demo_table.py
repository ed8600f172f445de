"""Train a grid of runs on this machine and print one Markdown table of them: `python demo_table.py GRID OUT`.

GRID is a file like sweeps/demo.yaml; OUT/OBJECTIVE-CALIBRATION-SEED are the run folders, and what is done
there already is not done again. A script, not a test. Imports everything once and forks a process for each
cell, two at a time.
"""

import contextlib
import functools
import itertools
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import rcpo.trainer  # noqa: F401  (what the forked processes use)
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.schema import Config, validate
from rcpo.run_folder import RunFolder, config_tree, open_run
from rcpo.worker import run_worker

NUM_AT_ONCE = 2


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    values: dict[str, Any]
    words: list[str]
    run: RunFolder

    @property
    def group(self) -> tuple[str, ...]:
        """What the seeds of a row of the table have in common."""
        return tuple(str(value) for key, value in self.values.items() if key != "seed")

    @functools.cached_property
    def config(self) -> Config:
        """As the run was made with."""
        return open_run(str(self.run.path))[1]

    @property
    def status(self) -> str:
        return str(self.run.read_run().get("status", "absent"))


def read_grid(path: Path, out: Path) -> list[Cell]:
    """The cells of a grid file, the last key varying fastest."""
    grid = yaml.safe_load(path.read_text())
    cells = []
    for values in itertools.product(*grid["grid"].values()):
        named = dict(zip(grid["grid"], values, strict=True))
        words = [*grid["overrides"], *(f"{key}={value}" for key, value in named.items())]
        cells.append(Cell(named, words, RunFolder(out / "-".join(map(str, values)))))
    return cells


def make_config(cell: Cell) -> Config:
    tree = compose([*cell.words, f"run_dir={cell.run.path}", f"name={cell.run.path.name}"])
    assert tree is not None
    return resolve(validate(tree), None)


def train_in_child(cell: Cell) -> int:
    """Start a process that trains the cell, its output in logs/console.log; returns its id."""
    config = make_config(cell)
    shutil.rmtree(cell.run.path, ignore_errors=True)
    cell.run.create(config, config_tree(config))
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with (cell.run.logs / "console.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = run_worker(cell.run, config, resume=False)
    finally:
        os._exit(code)


def train_cells(cells: list[Cell]) -> None:
    """Train those that have not ended yet. One that fails keeps its folder, with the reason in run.json."""
    waiting = [cell for cell in cells if cell.status not in ("done", "failed")]
    total, running = len(waiting), {}
    started = time.monotonic()
    while waiting or running:
        while waiting and len(running) < NUM_AT_ONCE:
            cell = waiting.pop(0)
            running[train_in_child(cell)] = cell
        child, _ = os.waitpid(-1, 0)
        cell = running.pop(child)
        num_done = total - len(waiting) - len(running)
        print(
            f"{num_done}/{total} {cell.run.path.name}: {cell.status}, {time.monotonic() - started:.0f} s",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class Column:
    """One number a run, from its summary and the rows of metrics.jsonl; shown as `text` says."""

    head: str
    value: Callable[[dict[str, Any], list[dict[str, Any]], int], float | None]
    text: Callable[[float], str]


def of_summary(key: str) -> Callable[[dict[str, Any], list[dict[str, Any]], int], float | None]:
    return lambda summary, rows, every: summary[key]


def in_band_share(summary: dict[str, Any], rows: list[dict[str, Any]], every: int) -> float | None:
    """Of the steps that every cell measures: some calibrations measure more than those."""
    inside = [
        row["band/inside"] for row in rows if "band/inside" in row and (int(row["step"]) - 1) % every == 0
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
)


def table_lines(cells: list[Cell]) -> Iterator[str]:
    """Markdown: mean and, behind +-, standard deviation over the seeds; failed runs are named, not
    averaged."""
    keys = [key for key in cells[0].values if key != "seed"]
    heads = [*keys, *(column.head for column in COLUMNS), "band of"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + " --- |" * len(heads)
    for group, members in itertools.groupby(cells, key=lambda cell: cell.group):
        done = [cell for cell in members if cell.status == "done"]
        texts = [_cell_text(column, done) for column in COLUMNS]
        band = done[0].config.calibration if done else None
        texts.append("" if band is None else f"{band.scope}, {band.estimator}")
        yield f"| {' | '.join([*group, *texts])} |"
    for cell in cells:
        if cell.status != "done":
            yield f"\n{cell.run.path.name}: {cell.status}: {cell.run.read_run().get('exit_reason')}"


def _cell_text(column: Column, done: list[Cell]) -> str:
    values = []
    for cell in done:
        every = cell.config.metrics.geometry_every
        value = column.value(cell.run.read_run()["summary"], cell.run.rows(cell.run.metrics), every)
        if value is not None:
            values.append(value)
    if not values:
        return "-"
    text = column.text(statistics.fmean(values))
    return text if len(values) == 1 else f"{text} ± {column.text(statistics.stdev(values)).lstrip('+')}"


def main(grid: str, out: str) -> None:
    os.environ.setdefault("RCPO_CACHE", str(Path(out).absolute() / "cache"))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    cells = read_grid(Path(grid), Path(out).absolute())
    with contextlib.suppress(KeyboardInterrupt):
        train_cells(cells)
    print("\n".join(table_lines(cells)))


if __name__ == "__main__":
    main(*sys.argv[1:])
