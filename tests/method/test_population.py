"""metrics.population: products between all pairs of measurements, and how well they are known."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from rcpo.method.metrics import population_metrics
from rcpo.method.population import EDGE, PairSums, PopulationGeometry
from rcpo.method.scores import Sides
from rcpo.method.statistics import StepStatistics
from rcpo.training.reader import Measured, Reader

HAND = (
    Sides([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])], 1.0, 0.5),
    Sides([torch.tensor([-0.5, -1.0])], [torch.tensor([2.0, 1.0])], -2.0, 1.0),
    Sides([torch.tensor([3.0, 0.0])], [torch.tensor([1.0, 1.0])], 1.0, 1.0),
)
"""v_w = (1, 0), (1, 2), (3, 0) and v_l = (0, 1), (2, 1), (1, 1)."""


def measure(reader: Reader, sides: Sides, metric: list[Tensor] | None = None, keep: bool = True) -> Measured:
    """One measured step on one rank."""
    found = reader.read(reader.products(sides, metric).tolist())
    if keep:
        reader.keep()
    return found


def test_three_measurements_by_hand() -> None:
    """Chosen: 1 + 3 + 3 over three pairs. Rejected: 1 + 1 + 3. Mixed, both ways round: 2 + 2, 1 + 0 and
    3 + 6 over six."""
    reader = Reader(weighted=False, population=True)
    assert measure(reader, HAND[0]).population == {}
    second = measure(reader, HAND[1]).population["population"]
    assert (second.chosen_squared, second.rejected_squared, second.dot) == (1, 1, 2)
    third = measure(reader, HAND[2])
    assert third.geometry is not None
    assert (third.geometry.chosen_squared, third.geometry.rejected_squared, third.geometry.dot) == (9, 2, 3)
    (known,) = third.population.values()
    assert (known.chosen_squared, known.rejected_squared) == (pytest.approx(7 / 3), pytest.approx(5 / 3))
    assert known.dot == pytest.approx(7 / 3)
    assert known.cosine == pytest.approx(7 / math.sqrt(35))
    assert (known.num_measurements, known.covariance) == (3, None)


def test_a_surprise_by_hand() -> None:
    """The third one's products with those before: 6/2, 4/2 and 5/2 a pair, after 1, 1 and 2: y = (2, 1, .5),
    times (t-2)(t-1)/t = 2/3."""
    pairs = PairSums().after(None).after([1, 1, 2]).after([6, 4, 5])
    assert pairs.products == (7, 5, 7)
    assert (pairs.num_measurements, pairs.num_pairs, pairs.num_surprises, pairs.weight) == (3, 3, 1, 1)
    y = np.array([2, 1, 0.5])
    assert pairs.surprises == pytest.approx((2 / 3 * np.outer(y, y)).flatten())


class Recorded:
    """Every vector that was measured, and the metric at its step: what a reader does not keep."""

    def __init__(self, num_parts: int = 2, size: int = 20) -> None:
        draw = torch.Generator().manual_seed(3)
        common = torch.randn(num_parts, size, generator=draw)

        def side(shift: float) -> list[Tensor]:
            return list(common + shift + torch.randn(num_parts, size, generator=draw))

        self.sides = [Sides(side(0.0), side(0.3), 0.5 + t / 5, -1.0 - t / 7) for t in range(9)]
        self.metrics = [list(torch.rand(num_parts, size, generator=draw) + 0.1) for _ in self.sides]

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        """v_w and v_l of each measurement, fp64."""
        chosen = [torch.cat(each.chosen).double() * each.chosen_scale for each in self.sides]
        rejected = [torch.cat(each.rejected).double() * each.rejected_scale for each in self.sides]
        return chosen, rejected

    def products(self, now: int, before: int, metric: Tensor | float) -> Tensor:
        """Of two different measurements: chosen, rejected, the mean of both mixed ones (3,)."""
        (w, w_before), (z, z_before) = ((side[now], side[before]) for side in self.vectors())
        mixed = ((metric * w * z_before).sum() + (metric * z * w_before).sum()) / 2
        return torch.stack([(metric * w * w_before).sum(), (metric * z * z_before).sum(), mixed])

    def estimate(self, num: int, first: int, in_adam: bool) -> Tensor:
        """The mean over all pairs of the first `num` measurements whose later one is not before `first`, in
        the metric of the later one."""
        found = [
            self.products(now, before, torch.cat(self.metrics[now]).double() if in_adam else 1.0)
            for now in range(first, num)
            for before in range(now)
        ]
        return torch.stack(found).mean(0)

    def covariance(self, num: int, first: int, in_adam: bool) -> Tensor:
        """From the surprises, as the docstring of the module says."""
        total, weights = torch.zeros(3, 3, dtype=torch.float64), 0.0
        for now in range(first + 1, num):
            metric = torch.cat(self.metrics[now]).double() if in_adam else 1.0
            mean = torch.stack([self.products(now, before, metric) for before in range(now)]).mean(0)
            y, t = mean - self.estimate(now, first, in_adam), now + 1
            total += (t - 2) * (t - 1) / t * torch.outer(y, y)
            weights += t - 2
        return 4 / num * total / weights


FIRST_METRIC = 3
"""The measurement from which on Adam has a metric."""


@pytest.mark.parametrize("kind", ["population", "adam"])
def test_sums_equal_all_pairs_by_brute_force(kind: str) -> None:
    """Nine measurements in two parts, scales that change, a metric that changes and is there from the fourth
    on: estimates and covariance against every pair of the vectors."""
    recorded, reader = Recorded(), Reader(weighted=True, population=True)
    first = FIRST_METRIC if kind == "adam" else 1
    for idx, sides in enumerate(recorded.sides):
        metric = recorded.metrics[idx] if idx >= FIRST_METRIC else None
        found = measure(reader, sides, metric).population
        assert (kind in found) == (idx >= first)
        if kind not in found:
            continue
        expected = recorded.estimate(idx + 1, first, kind == "adam")
        known = found[kind]
        assert (known.weighted, known.num_measurements) == (True, idx + 1)
        assert [known.chosen_squared, known.rejected_squared, known.dot] == pytest.approx(
            expected.tolist(), rel=1e-5
        )
        assert (known.covariance is None) == (idx - first < 4)
        if known.covariance is not None:
            spread = recorded.covariance(idx + 1, first, kind == "adam")
            assert known.covariance == pytest.approx(spread.flatten().tolist(), rel=1e-4)


def test_all_pairs_are_the_square_of_the_sum_less_the_squares() -> None:
    """(|S|^2 - sum |v|^2) / (n (n-1))."""
    recorded = Recorded()
    chosen, rejected = recorded.vectors()
    n = len(chosen)

    def less_squares(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
        whole = torch.dot(sum(one), sum(other))  # type: ignore[arg-type]
        return float(whole - sum(torch.dot(a, b) for a, b in zip(one, other, strict=True))) / (n * (n - 1))

    reader = Reader(weighted=False, population=True)
    *_, last = [measure(reader, sides) for sides in recorded.sides]
    known = last.population["population"]
    assert known.chosen_squared == pytest.approx(less_squares(chosen, chosen), rel=1e-5)
    assert known.rejected_squared == pytest.approx(less_squares(rejected, rejected), rel=1e-5)
    assert known.dot == pytest.approx(less_squares(chosen, rejected), rel=1e-5)


def test_a_step_that_was_not_taken_leaves_no_trace() -> None:
    """Its numbers may not be finite."""
    one, other = (Reader(weighted=True, population=True) for _ in range(2))
    broken = Sides([torch.full((2,), math.nan)], [torch.ones(2)], 1.0, 1.0)
    for sides in HAND:
        measure(other, broken, keep=False)
        assert measure(one, sides) == measure(other, sides)


def test_a_resumed_reader_goes_on_bit_for_bit() -> None:
    """Stopped before the first measurement, after one, and with and without Adam's metric."""
    recorded = Recorded()
    metrics = [None] * FIRST_METRIC + recorded.metrics[FIRST_METRIC:]
    never_stopped = Reader(weighted=True, population=True)
    expected = [measure(never_stopped, *each) for each in zip(recorded.sides, metrics, strict=True)]
    for cut in (0, 1, 2, 5, 8):
        found, reader = [], Reader(weighted=True, population=True)
        for idx, each in enumerate(zip(recorded.sides, metrics, strict=True)):
            if idx == cut:
                state = {name: tensor.clone() for name, tensor in reader.state().items()}
                reader = Reader(weighted=True, population=True)
                reader.load_state(state, torch.device("cpu"))
            found.append(measure(reader, *each))
        assert found == expected


def test_a_checkpoint_without_sums_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    reader = Reader(weighted=True, population=True)
    reader.load_state({"scales": torch.ones(2), "chosen.0": torch.ones(3)}, torch.device("cpu"))
    assert reader.state() == {}
    assert "population/* starts anew" in caplog.text


NUM_TRIALS, DIMENSIONS = 300, 50


@pytest.mark.parametrize(("num", "noise"), [(12, 1.0), (40, 1.0), (40, 3.0)])
def test_the_interval_covers_what_is_estimated(num: int, noise: float) -> None:
    """300 series of `num` measurements with mean vectors of length 1 and cosine .97, and noise of that length
    or three times it, most of it common to both sides. The 80 % intervals hold the true cosine and centre
    in 73 % of the series at least, and are at most 2.2 times as long as the estimates scatter."""
    draw = np.random.default_rng(1)
    means = np.zeros((2, DIMENSIONS))
    means[0, 0], means[1, :2] = 1.0, (0.97, math.sqrt(1 - 0.97**2))
    estimates, reaches = [], []
    for _ in range(NUM_TRIALS):
        own, other = draw.normal(size=(2, num, DIMENSIONS)) * noise / math.sqrt(DIMENSIONS)
        chosen, rejected = means[0] + own, means[1] + 0.9 * own + math.sqrt(0.19) * other
        pairs = PairSums().after(None)
        for t in range(1, num):
            (w, s_w), (z, s_z) = ((side[t], side[:t].sum(0)) for side in (chosen, rejected))
            pairs = pairs.after([w @ s_w, z @ s_z, (w @ s_z + z @ s_w) / 2])
        known = pairs.geometry(weighted=False)
        assert known is not None
        assert known.is_positive
        centre = 0.5 * math.log(known.rejected_squared / known.chosen_squared)
        estimates.append([known.cosine, centre])
        reaches.append([known.reach(known.cosine_gradient()), known.reach(known.log_norms_gradient())])
    off = np.abs(np.array(estimates) - [0.97, 0.0])
    covered = (off < reaches).mean(0)
    assert (covered > 0.73).all(), covered
    ratio = np.sqrt(np.square(reaches).mean(0)) / (EDGE * np.std(estimates, axis=0))
    assert ((ratio > 0.85) & (ratio < 2.2)).all(), ratio


COVARIANCE = tuple(np.diag([0.04, 0.09, 0.01]).flatten().tolist())


def row_of(products: tuple[float, float, float], weighted: bool, alpha: float = 0.5) -> dict[str, float]:
    """Seven measurements; log ratio log 16."""
    geometry = PopulationGeometry(*products, weighted, 7, COVARIANCE)
    statistics = StepStatistics(mean_d_w=0.16, mean_d_l=0.01, geometry=None, mean_r_w=0.0)
    return population_metrics(statistics, alpha, {"adam": geometry})


def test_the_row_by_hand_with_mean() -> None:
    """|v_w|^2 = 1, |v_l|^2 = 4, product 1: cosine 1/2, centre log 2. alpha 1/2 makes log 16 a position of
    log 4, so the slack is log 2 - log 2. Gradients, times variances .04, .09 and .01: of the cosine (-1/4,
    -1/16, 1/2), .00535; of the centre (-1/2, 1/8, 0), .0114; of the slack (0, 1/4, -1), 1/64."""
    row = row_of((1.0, 4.0, 1.0), weighted=False)
    cosine, centre, slack = EDGE * math.sqrt(0.0053515625), EDGE * math.sqrt(0.01140625), EDGE / 8
    assert pytest.approx(1.2815516) == EDGE
    assert row == pytest.approx(
        {
            "population/measurements": 7,
            "population/adam_cosine": 0.5,
            "population/adam_cosine_lower": 0.5 - cosine,
            "population/adam_cosine_upper": 0.5 + cosine,
            "population/adam_position": math.log(4),
            "population/adam_center": math.log(2),
            "population/adam_center_lower": math.log(2) - centre,
            "population/adam_center_upper": math.log(2) + centre,
            "population/adam_slack": 0,
            "population/adam_slack_lower": -slack,
            "population/adam_slack_upper": slack,
        },
        abs=1e-12,
    )


def test_the_row_by_hand_with_weighted() -> None:
    """The same products: position -log 2 - log 4, centre 0 by definition, slack log 2 - log 8. The position's
    gradient is the centre's; the slack's (1, 0, -1), .05."""
    row = row_of((1.0, 4.0, 1.0), weighted=True)
    reach, slack = EDGE * math.sqrt(0.01140625), EDGE * math.sqrt(0.05)
    assert row["population/adam_position"] == pytest.approx(-math.log(8))
    assert row["population/adam_position_lower"] == pytest.approx(-math.log(8) - reach)
    assert row["population/adam_position_upper"] == pytest.approx(-math.log(8) + reach)
    assert row["population/adam_center"] == 0
    assert "population/adam_center_lower" not in row
    assert row["population/adam_slack"] == pytest.approx(-math.log(4))
    assert row["population/adam_slack_lower"] == pytest.approx(-math.log(4) - slack)
    assert row["population/adam_slack_upper"] == pytest.approx(-math.log(4) + slack)


def test_noise_is_shown_as_it_is() -> None:
    """A cosine of 1.25 has a half-width of -log 1.25. One below 0 has an infinite slack, without edges. No
    squared length below 0 has a cosine."""
    beyond = row_of((1.0, 4.0, 2.5), weighted=False)
    assert beyond["population/adam_cosine"] == 1.25
    assert beyond["population/adam_slack"] == pytest.approx(-math.log(1.25) - math.log(2))
    below = row_of((1.0, 4.0, -1.0), weighted=False)
    assert (below["population/adam_cosine"], below["population/adam_slack"]) == (-0.5, math.inf)
    assert "population/adam_slack_lower" not in below
    assert below["population/adam_cosine_lower"] < -0.5 < below["population/adam_cosine_upper"]
    lost = row_of((-0.1, 4.0, 1.0), weighted=False)
    assert set(lost) == {"population/measurements", "population/adam_cosine"}
    assert math.isnan(lost["population/adam_cosine"])
