"""What the figures draw: the small arrays behind them by hand, and every figure for runs of every shape."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import plotly.graph_objects
import pytest

from helpers.compare_folders import make_run
from rcpo.comparison.find import find_runs
from rcpo.comparison.groups import Comparison, compare_runs, panels
from rcpo.comparison.load import load_run
from rcpo.report.curves import (
    alpha_curve,
    band_curve,
    band_range,
    cosine_shares,
    held_out_curve,
    pair_points,
    pathway_shares,
)
from rcpo.report.figures import heat_map, objective_figures
from rcpo.report.palette import looks
from rcpo.report.static import write_figures

REJECTED = (-2.0, -2.0, -2.0, -2.0)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A figure that warns (empty slices, limits that are equal or not finite) is a figure that is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def compare(path: Path) -> Comparison:
    return compare_runs([load_run(run) for run in find_runs([str(path)])])


def test_held_out_curves_are_means_over_seeds_at_the_steps_of_both(tmp_path: Path) -> None:
    """Means of chosen 1 and 3 at the end, half in the middle: 0, 1, 2 with error 0, 0.5, 1."""
    for seed, value in ((0, 1.0), (1, 3.0)):
        make_run(tmp_path / str(seed), seed=seed, change=((value,) * 4, REJECTED))
    curve = held_out_curve(compare(tmp_path).groups[0], "chosen")
    assert curve.x.tolist() == [0, 4, 8]
    assert curve.mean.tolist() == [0, 1, 2]
    assert curve.error.tolist() == pytest.approx([0, 0.5, 1])


def test_training_curves_have_a_point_a_step_or_a_mean_of_several(tmp_path: Path) -> None:
    """8 steps: 8 points. 180 steps: 60 points, each of 3 steps; alpha 1.2 throughout; position 0.1 a step, so
    0.2 in the first bin of steps 1, 2, 3."""
    make_run(tmp_path / "short" / "a", calibration="on")
    short = compare(tmp_path / "short").groups[0]
    assert alpha_curve(short).x.tolist() == [*range(1, 9)]
    make_run(tmp_path / "long" / "a", calibration="on", steps=180)
    long = compare(tmp_path / "long").groups[0]
    curve = band_curve(long)
    assert curve is not None
    assert curve.x[:3].tolist() == pytest.approx([2, 5, 8])
    assert curve.position[:2].tolist() == pytest.approx([0.2, 0.5])
    assert alpha_curve(long).mean.tolist() == pytest.approx([1.2] * 60)
    # Steps 1 and 3 are open, 2 is not: the median is open; in the next bin 4 and 6 are not.
    assert curve.upper[:2].tolist() == [math.inf, 0.25]
    assert curve.share_inside == pytest.approx(91 / 180)


def test_a_band_measured_every_fourth_step_has_a_point_each(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", steps=40))
    chosen = np.arange(40) % 4 != 0
    for name, values in run.curves.items():
        if name.startswith(("band", "score")):
            values[chosen] = np.nan
    curve = band_curve(compare_runs([run]).groups[0])
    assert curve is not None
    assert curve.x.tolist() == pytest.approx([*range(1, 41, 4)])


def test_shares_of_cosine_and_pathways_add_up_to_one(tmp_path: Path) -> None:
    """Cosines are 0.5 and -0.5 in turn. Of 8 steps each quarter has two; pathways are the step modulo 4."""
    for seed in (0, 1):
        make_run(tmp_path / str(seed), seed=seed)
    group = compare(tmp_path).groups[0]
    cosine, pathways = cosine_shares(group), pathway_shares(group)
    assert cosine is not None
    assert sorted(cosine.tolist())[-3:] == [0, 0.5, 0.5]
    assert pathways is not None
    assert pathways.tolist() == [[0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5], [0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5]]


def test_pairs_are_means_over_seeds_and_many_are_thinned(tmp_path: Path) -> None:
    for seed, value in ((0, 1.0), (1, 3.0)):
        make_run(tmp_path / str(seed), seed=seed, change=((value, 0.0, 0.0, 0.0), REJECTED))
    comparison = compare(tmp_path)
    points = pair_points(comparison.groups[0])
    assert points is not None
    assert points.r_w.tolist() == [2, 0, 0, 0]
    assert points.r_l.tolist() == [*REJECTED]
    run = comparison.groups[0].runs[0]
    assert run.pairs is not None
    many = type(run.pairs)(np.zeros(2500), np.zeros(2500), np.zeros((2, 2500)))
    object.__setattr__(run, "pairs", many)
    thinned = pair_points(type(comparison.groups[0])("dpo", "off", {}, {}, [run]))
    assert thinned is not None
    assert (len(thinned.r_w), thinned.num_pairs, thinned.index[1]) == (834, 2500, 3)


def test_the_frame_of_the_bands_shows_all_positions_but_not_far_edges() -> None:
    def curve(lower: list[float], upper: list[float]) -> Any:
        from rcpo.report.curves import BandCurve

        three = np.array([-1.0, 0, 2])
        return BandCurve(three, three, np.zeros(3), np.array(lower), np.array(upper), 0.5)

    low, high = band_range([curve([-3, -3, -900], [4, 4, 900]), curve([-math.inf] * 3, [math.inf] * 3)])
    assert -600 < low <= -3
    assert 4 <= high < 600
    low, high = band_range([curve([-math.inf] * 3, [math.inf] * 3)])
    assert (low, high) == (pytest.approx(-1.24), pytest.approx(2.24))


def test_every_calibration_has_a_look_of_its_own() -> None:
    """Off is the same in every figure; two groups never share a colour while there are colours left."""
    many = ["off", "on", "on ema_beta=0.9", "exact", "feedback", "fixed alpha=2", "fixed alpha=3"]
    found = looks(many)
    assert len({(look.colour, look.dash, look.mark) for look in found.values()}) == len(many)
    assert looks(["on", "off"])["off"] is looks(["off"])["off"]
    assert len(looks(str(number) for number in range(50))) == 50


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no band": {"band": False},
    "one step": {"steps": 1},
    "two steps": {"steps": 2},
    "no per-pair results": {"with_pairs": False},
    "no change": {"change": ((0.0,) * 4, (0.0,) * 4)},
    "long": {"steps": 500},
}


@pytest.mark.parametrize("num_seeds", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_of_any_shape_get_figures_that_plotly_accepts(
    tmp_path: Path, shape: str, num_seeds: int
) -> None:
    """Plotly's own classes refuse a property that does not exist."""
    for calibration in ("off", "on"):
        for seed in range(num_seeds):
            make_run(tmp_path / f"{calibration}-{seed}", "dpo", calibration, seed, **SHAPES[shape])
    comparison = compare(tmp_path)
    (groups,) = panels(comparison).values()
    heat = heat_map(comparison)
    assert heat is not None
    figures = [heat, *objective_figures(groups)]
    expected = 6 - 3 * (shape == "no band") - (shape == "no per-pair results")
    assert len(figures) == expected
    for figure in figures:
        spec = figure.spec()
        plotly.graph_objects.Figure(data=spec["data"], layout=spec["layout"])
        said = figure.caption
        assert "seed" in said
        assert any(unit in said for unit in ("nats", "share", "Share", "without unit"))


def test_the_bands_figure_has_a_facet_a_calibration_on_one_scale(tmp_path: Path) -> None:
    for calibration in ("off", "on", "exact"):
        make_run(tmp_path / calibration, "dpo", calibration)
    (groups,) = panels(compare(tmp_path)).values()
    spec = objective_figures(groups)[0].spec()
    assert spec["facets"] == ["off: 62% inside", "on: 62% inside", "exact: 62% inside"]
    assert spec["layout"]["yaxis"]["range"] == spec["layout"]["yaxis3"]["range"]
    position = [trace for trace in spec["data"] if trace["name"] == "position"]
    assert [trace["xaxis"] for trace in position] == ["x", "x2", "x3"]
    assert position[0]["y"] == pytest.approx([0.1 * step for step in range(1, 9)])


@pytest.mark.ci("figures for a paper")
@pytest.mark.parametrize("suffix", ["pdf", "png"])
def test_figures_for_a_paper_are_one_column_wide(tmp_path: Path, suffix: str) -> None:
    """3.25 in: 975 points at 300 dpi; in PDF 234 points of 1/72 in, with fonts as outlines."""
    for calibration in ("off", "on"):
        make_run(tmp_path / "runs" / calibration, "dpo", calibration)
    make_run(tmp_path / "runs" / "other", "ipo", settings={"data.columns": "../ä"}, band=False)
    written = write_figures(compare(tmp_path / "runs"), tmp_path / "figures", suffix)
    names = [path.stem for path in written]
    kinds = ("band", "curves", "pairs", "cosine", "pathways")
    assert names[:6] == ["displacement-grid", *(f"{kind}-dpo" for kind in kinds)]
    assert len(names) == len(set(names)) == 8
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(
        ["captions.txt", *(path.name for path in written)]
    )
    captions = (tmp_path / "figures" / "captions.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in captions] == [path.name for path in written]
    for path in written:
        if suffix == "png":
            image = matplotlib.image.imread(path)
            assert image.shape[1] == 975
            assert image.std() > 0.03
        else:
            content = path.read_bytes()
            assert b"/MediaBox [ 0 0 234 " in content
            assert b"/Subtype /Type3" not in content
            assert b"/Subtype /Image" not in content or "grid" in path.stem


@pytest.mark.ci("figures for a paper")
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_of_any_shape_get_figures_for_a_paper(tmp_path: Path, shape: str) -> None:
    make_run(tmp_path / "runs" / "off", **SHAPES[shape])
    written = write_figures(compare(tmp_path / "runs"), tmp_path / "figures", "png")
    assert len(written) == 6 - 3 * (shape == "no band") - (shape == "no per-pair results")


def test_long_labels_leave_the_plot_its_room(tmp_path: Path) -> None:
    """matplotlib would warn that axes have no size left."""
    for number in range(2):
        name = f"{'a-long-name-' * 8}{number}"
        make_run(tmp_path / "runs" / str(number), "dpo", settings={"reference.path": name})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        write_figures(compare(tmp_path / "runs"), tmp_path / "figures", "png")
