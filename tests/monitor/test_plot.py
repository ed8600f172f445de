"""Pictures of runs are written for every shape that rows can have, and show what the rows say."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers import readme_pictures
from rcpo.monitor.plot import (
    band_limits,
    column,
    draw_band,
    draw_displacement,
    plot_run,
    smooth,
)
from rcpo.runs.folder import RunFolder
from rcpo.runs.rows import encode_row

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A plot that warns (empty slices, limits that are equal or not finite) is a plot that is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def step_row(step: int, *, band: bool = True, edge: float = 1.0, chosen: float = 0.0) -> Row:
    row: Row = {
        "step": step,
        "displacement/chosen": chosen - 0.1 * step,
        "displacement/rejected": chosen - 0.2 * step,
        "calibration/alpha": 1.0 + 0.1 * step if band else 1.0,
    }
    if band:
        row |= {
            "band/position": 0.1 * step,
            "band/center": 0.3,
            "band/lower": 0.3 - edge,
            "band/upper": 0.3 + edge,
            "band/inside": 1.0,
        }
    return row


def evaluation(step: int, chosen: float, rejected: float) -> Row:
    return {"step": step, "displacement/chosen": chosen, "displacement/rejected": rejected}


EVALUATIONS = [evaluation(0, 0.0, 0.0), evaluation(20, -2.0, -4.0)]


def make_run(path: Path, steps: list[Row], evaluations: list[Row]) -> RunFolder:
    path.mkdir()
    run = RunFolder(path)
    run.metrics.write_text("".join(encode_row(row) + "\n" for row in steps))
    run.eval.write_text("".join(encode_row(row) + "\n" for row in evaluations))
    return run


def steps_of(num: int, **changes: Any) -> list[Row]:
    return [step_row(step, **changes) for step in range(1, num + 1)]


SHAPES: dict[str, tuple[list[Row], list[Row]]] = {
    "off": (steps_of(20, band=False), EVALUATIONS),
    "on": (steps_of(20), EVALUATIONS),
    "band every 8th step": ([step_row(step, band=step % 8 == 0) for step in range(1, 21)], EVALUATIONS),
    "infinite edges": (steps_of(20, edge=math.inf), EVALUATIONS),
    "some infinite edges": ([*steps_of(10, edge=math.inf), *steps_of(20)[10:]], EVALUATIONS),
    "nan in training": ([*steps_of(10), *steps_of(20, chosen=math.nan, edge=math.nan)[10:]], EVALUATIONS),
    "nan at the end": (steps_of(20), [evaluation(0, 0.0, 0.0), evaluation(20, math.nan, math.inf)]),
    "nothing finite": (steps_of(20, chosen=math.nan), [evaluation(0, math.nan, math.nan)]),
    "one evaluation": (steps_of(20), EVALUATIONS[:1]),
    "one step": (steps_of(1), [EVALUATIONS[0], evaluation(1, -0.1, -0.2)]),
    "one step, infinite edges": (steps_of(1, edge=math.inf), [EVALUATIONS[0], evaluation(1, -0.1, -0.2)]),
    "no step": ([], EVALUATIONS[:1]),
    "no rows": ([], []),
    "band edges far away": (steps_of(20, edge=1e6), EVALUATIONS),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_of_any_shape_gets_a_picture_and_no_other_file(tmp_path: Path, shape: str) -> None:
    steps, evaluations = SHAPES[shape]
    run = make_run(tmp_path / "run", steps, evaluations)
    plot_run(run, run.plot)
    assert sorted(path.name for path in run.path.iterdir()) == [
        "displacement.png",
        "eval.jsonl",
        "metrics.jsonl",
    ]
    image = matplotlib.image.imread(run.plot)
    assert image.shape[1] == 1200
    with_panels = any("band/position" in row for row in steps)
    assert (image.shape[0] > 700) == with_panels
    assert image.std() > 0.05


def axis() -> Axes:
    return Figure().subplots()


def line(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    found = next(line for line in axes.lines if line.get_label() == label)
    return list(map(float, found.get_xdata())), list(map(float, found.get_ydata()))


def test_the_lines_are_the_evaluations_and_their_last_values_are_written_beside_them() -> None:
    axes = axis()
    draw_displacement(axes, steps_of(20), EVALUATIONS)
    assert line(axes, "chosen") == ([0, 20], [0, -2])
    assert line(axes, "rejected") == ([0, 20], [0, -4])
    assert [text.get_text() for text in axes.texts] == ["rejected -4.00", "chosen -2.00"]


@pytest.mark.parametrize("chosen", [-2.0, -2.01, 0.0])
def test_the_two_labels_never_overlap_and_stay_in_the_order_of_their_values(chosen: float) -> None:
    """On a range of about 4 nats; a label is about 0.3 high. A tie has chosen above."""
    axes = axis()
    draw_displacement(axes, steps_of(20), [EVALUATIONS[0], evaluation(20, chosen, -2.0)])
    heights = {text.get_text().split()[0]: text.xy[1] for text in axes.texts}
    upper, lower = ("chosen", "rejected") if chosen >= -2.0 else ("rejected", "chosen")
    low, high = axes.get_ylim()
    assert heights[upper] - heights[lower] >= 0.074 * (high - low)


def test_the_band_is_drawn_where_it_was_measured_and_its_share_is_the_title() -> None:
    """Three measured steps, two inside; the panel shows the band's edges at -0.7 and 1.3."""
    rows = [step_row(8), step_row(9, band=False), step_row(16), step_row(24) | {"band/inside": 0.0}]
    axes = axis()
    draw_band(axes, rows)
    assert axes.get_title() == "Disentanglement band: 67% of the measured steps inside"
    (fill,) = axes.collections
    corners = fill.get_paths()[0].vertices
    assert (corners[:, 0].min(), corners[:, 0].max()) == (7.5, 24.5)
    assert (corners[:, 1].min(), corners[:, 1].max()) == (pytest.approx(-0.7), pytest.approx(1.3))
    assert line(axes, "position")[0] == [8, 16, 24]


def test_steps_without_edges_fill_the_panel_and_are_hatched() -> None:
    axes = axis()
    draw_band(axes, [*steps_of(3, edge=math.inf), *steps_of(6)[3:]])
    band, hatched = axes.collections
    low, high = axes.get_ylim()
    assert np.isfinite([low, high]).all()
    corners = hatched.get_paths()[0].vertices
    assert (corners[:, 0].min(), corners[:, 0].max()) == (0.5, 3.5)
    assert (corners[:, 1].min(), corners[:, 1].max()) == (pytest.approx(low), pytest.approx(high))
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(high)
    assert "no edges (rho \N{LESS-THAN OR EQUAL TO} 0)" in [
        text.get_text() for text in axes.get_legend().get_texts()
    ]


def test_band_limits_show_every_position_and_centre_but_not_far_edges() -> None:
    position, center = np.array([-1.0, 0.0, 2.0, np.nan]), np.array([0.5, 0.5, 0.5, 0.5])
    low, high = band_limits(
        position, center, np.array([-3.0, -3, -900, -np.inf]), np.array([4.0, 4, 900, np.inf])
    )
    assert -600 < low <= -3
    assert 4 <= high < 600
    assert band_limits(position, center, np.full(4, -np.inf), np.full(4, np.inf)) == (
        pytest.approx(-1.24),
        pytest.approx(2.24),
    )


def test_running_means_skip_what_is_not_finite_and_keep_both_ends() -> None:
    """A ramp keeps its middle; at the ends the window of nine is cut to five: mean of 0 .. 4 is 2."""
    values = np.arange(20.0)
    assert smooth(values)[[0, 10, 19]].tolist() == [2, 10, 17]
    values[3], values[4] = np.nan, np.inf
    assert smooth(values)[0] == 1
    assert np.isnan(smooth(np.full(3, np.nan))).all()


def test_a_column_has_only_the_rows_that_measured_it() -> None:
    steps, values = column([{"step": 1, "x": 2.0}, {"step": 2}, {"step": 3, "x": -math.inf}], "x")
    assert (steps.tolist(), values.tolist()) == ([1, 3], [2, -math.inf])


def test_the_readme_s_pictures_can_be_drawn(tmp_path: Path) -> None:
    """Two runs side by side, one with edges that are infinite for 10 of 20 steps."""
    for name, shape in (("one", "on"), ("other", "some infinite edges")):
        make_run(tmp_path / name, *SHAPES[shape])
    runs = [f"{name}={tmp_path / name}" for name in ("one", "other")]
    for kind, width in (("displacement", 1230), ("band", 1600)):
        readme_pictures.main(kind, str(tmp_path / f"{kind}.png"), *runs)
        assert matplotlib.image.imread(tmp_path / f"{kind}.png").shape[1] == width


def test_running_medians_keep_what_is_infinite_where_most_is() -> None:
    """Of nine values five infinite: infinite; four: the largest finite one. Not a number counts as none."""

    def fifth(values: list[float]) -> float:
        rows = [{"step": idx, "band/position": 0.0, "band/lower": 0.0, "band/upper": value}
                for idx, value in enumerate(values)]  # fmt: skip
        return readme_pictures.with_median_edges(rows)[4]["band/upper"]

    assert fifth([1.0, 2, 3, 4, 5, *[math.inf] * 4]) == 5
    assert fifth([1.0, 2, 3, 4, *[math.inf] * 5]) == math.inf
    assert fifth([1.0, 2, 3, 4, *[math.nan] * 5]) == 3
    assert math.isnan(fifth([math.nan] * 9))
