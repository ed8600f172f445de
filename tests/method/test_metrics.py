"""Every metric's value by hand, from three pairs and one geometry."""

import math

import pytest
import torch

from rcpo.method.calibrators import BandCalibration, FixedCalibration, StepStatistics
from rcpo.method.incentives import Incentives
from rcpo.method.metrics import QUANTITIES, band_metrics, displacement_row, pair_sums, pathway, step_row
from rcpo.method.scores import ScoreGeometry
from rcpo.objectives import PairLogProbs

PAIR = PairLogProbs(
    z_w=torch.tensor([-4.0, -6.0, -9.0]),
    z_l=torch.tensor([-8.0, -3.0, -5.0]),
    ref_w=torch.tensor([-5.0, -4.0, -8.0]),
    ref_l=torch.tensor([-6.0, -1.0, -9.0]),
    len_w=torch.tensor([2.0, 3.0, 3.0]),
    len_l=torch.tensor([4.0, 1.0, 5.0]),
)
"""r_w = 1, -2, -1 and r_l = -2, -2, 4: right, a tie, wrong."""


def test_pair_sums_by_hand() -> None:
    """z_w/|y_w| = -2, -2, -3; z_l/|y_l| = -2, -3, -1; accuracy 1 + 1/2 + 0; chosen down 2; both down 1 (the
    tie)."""
    incentives = Incentives(torch.tensor([0.5, 0.25, 0.5]), torch.tensor([1.0, -2.0, 4.0]))
    sums = pair_sums(torch.tensor([1.0, 2.0, 4.5]), PAIR, incentives)
    assert sums.dtype == torch.float64
    assert dict(zip(QUANTITIES, sums.tolist(), strict=True)) == {
        "train/loss": 7.5,
        "logps/chosen": -19,
        "logps/rejected": -16,
        "logps/chosen_per_token": -7,
        "logps/rejected_per_token": -6,
        "displacement/chosen": -2,
        "displacement/rejected": 0,
        "displacement/accuracy": 1.5,
        "displacement/chosen_down": 2,
        "displacement/both_down": 1,
        "incentive/chosen": 1.25,
        "incentive/rejected": 3,
    }


def test_the_noise_floor_by_hand() -> None:
    """A pair's rounding of 0.3 nats, and n = 9 pairs: two standard errors are 2 * 0.3 / 3."""
    z = torch.zeros(9)
    row = displacement_row(z, z, z, z, noise=0.3)
    assert row["displacement/noise_floor"] == pytest.approx(0.2)
    assert "displacement/noise_floor" not in displacement_row(z, z, z, z)


def test_displacement_row_by_hand() -> None:
    """Means of the same three pairs: -2/3 and 0, margin -2/3, accuracy 1/2, 2 of 3 down, 1 of 3 both."""
    assert displacement_row(PAIR.z_w, PAIR.z_l, PAIR.ref_w, PAIR.ref_l) == {
        "displacement/chosen": pytest.approx(-2 / 3),
        "displacement/rejected": 0,
        "displacement/margin": pytest.approx(-2 / 3),
        "displacement/accuracy": 0.5,
        "displacement/chosen_down": pytest.approx(2 / 3),
        "displacement/both_down": pytest.approx(1 / 3),
        "logps/chosen": pytest.approx(-19 / 3),
        "logps/rejected": pytest.approx(-16 / 3),
    }


def test_at_step_zero_nothing_has_moved() -> None:
    """A model compared with itself: displacement 0, accuracy 1/2 (all ties), nobody down."""
    row = displacement_row(PAIR.z_w, PAIR.z_l, PAIR.z_w, PAIR.z_l)
    assert (row["displacement/chosen"], row["displacement/accuracy"], row["displacement/chosen_down"]) == (
        0,
        0.5,
        0,
    )


def test_step_row_by_hand() -> None:
    """d_w = .5, d_l = 1, alpha = 2: pull 1, push .5. |s_w|^2 = 4, |s_l|^2 = 16, dot 4 (rho 1/2):
    rates 1*4 - .5*4 = 2 and 1*4 - .5*16 = -4, pathway 0. log r = log .5; position log .5 + 2 log 2 = log 2 =
    the centre log(4/2), so slack = half-width = log 2, edges 0 and log 4. The EMA shown is the one alpha came
    from."""
    calibrator = BandCalibration(ema_beta=0.98, max_log_alpha=3.0, every=1)
    calibrator.position_ema, calibrator.center_ema = -0.25, 0.75
    statistics = StepStatistics(0.5, 1.0, ScoreGeometry(4.0, 16.0, 4.0))
    means = {"displacement/chosen": 1.5, "displacement/rejected": -0.5, "train/loss": 0.7}
    log_2 = pytest.approx(math.log(2))
    assert step_row(means, statistics, 2.0, calibrator) == {
        "train/loss": 0.7,
        "displacement/chosen": 1.5,
        "displacement/rejected": -0.5,
        "displacement/margin": 2.0,
        "calibration/alpha": 2.0,
        "calibration/position_ema": -0.25,
        "calibration/center_ema": 0.75,
        "incentive/log_ratio": pytest.approx(-math.log(2)),
        "score/chosen_norm": 2.0,
        "score/rejected_norm": 4.0,
        "score/cosine": 0.5,
        "dynamics/chosen_rate": 2.0,
        "dynamics/rejected_rate": -4.0,
        "dynamics/pathway": 0.0,
        "band/position": log_2,
        "band/center": log_2,
        "band/lower": pytest.approx(0, abs=1e-12),
        "band/upper": pytest.approx(math.log(4)),
        "band/slack": log_2,
        "band/inside": 1.0,
    }


def test_step_row_without_geometry_has_no_band() -> None:
    """calibration=off, nothing measured: the means, the margin, alpha = 1 and log r = log(.5/2)."""
    means = {"displacement/chosen": 1.0, "displacement/rejected": 4.0}
    row = step_row(means, StepStatistics(0.5, 2.0, None), 1.0, FixedCalibration())
    assert row == {
        **means,
        "displacement/margin": -3.0,
        "calibration/alpha": 1.0,
        "incentive/log_ratio": pytest.approx(-math.log(4)),
    }


def test_negative_incentive_has_rates_but_no_band() -> None:
    """d_w = -1, d_l = 1, orthogonal scores: dz_w = -4, dz_l = -16, both down; log r does not exist."""
    row = band_metrics(StepStatistics(-1.0, 1.0, ScoreGeometry(4.0, 16.0, 0.0)), 1.0)
    assert (row["dynamics/chosen_rate"], row["dynamics/rejected_rate"], row["dynamics/pathway"]) == (
        -4,
        -16,
        2,
    )
    assert not any(key.startswith("band/") for key in row)


def test_negative_rho_has_infinite_edges_and_is_inside() -> None:
    """Opposed scores help each other: dz_w = 4 + 4, dz_l = -4 - 16 at d_w = d_l = 1."""
    row = band_metrics(StepStatistics(1.0, 1.0, ScoreGeometry(4.0, 16.0, -4.0)), 1.0)
    assert (row["band/lower"], row["band/upper"], row["band/inside"]) == (-math.inf, math.inf, 1)
    assert row["score/cosine"] == -0.5
    assert (row["dynamics/chosen_rate"], row["dynamics/rejected_rate"], row["dynamics/pathway"]) == (
        8,
        -20,
        0,
    )


@pytest.mark.parametrize("log_ratio", [-1.2, -0.1, 0.1, 0.7, 1.3, 1.5, 2.4])
def test_inside_means_pathway_zero(log_ratio: float) -> None:
    """Band (0, log 4) of the geometry above; the two ways of asking agree on both sides of both edges."""
    row = band_metrics(StepStatistics(math.exp(log_ratio), 1.0, ScoreGeometry(4.0, 16.0, 4.0)), 1.0)
    assert (row["band/inside"] == 1) == (0 < log_ratio < math.log(4)) == (row["dynamics/pathway"] == 0)


@pytest.mark.parametrize(
    ("chosen_rate", "rejected_rate", "expected"),
    [
        (1, -1, 0),
        (0, 0, 0),
        (1, 1, 1),
        (-1, -1, 2),
        (-1, 0, 2),
        (-1, 1, 3),
        (math.nan, 1, math.nan),
        (1, math.nan, math.nan),
    ],
)
def test_pathway(chosen_rate: float, rejected_rate: float, expected: float) -> None:
    """0 chosen up & rejected down, 1 both up, 2 both down, 3 chosen down & rejected up; standing still counts
    as good."""
    assert pathway(chosen_rate, rejected_rate) == pytest.approx(expected, nan_ok=True)


def test_pairs_that_calibration_steers_by_are_also_shown_apart() -> None:
    """r_w = 1, 2, 6 and r_l = -1, 0, -5, two probed: means 1.5 / -.5, and 6 / -5 of the rest."""
    start = torch.zeros(3)
    z = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-1.0, 0.0, -5.0])
    row = displacement_row(*z, start, start, num_probed=2)
    assert row["displacement/chosen"] == 3.0
    apart = {key: value for key, value in row.items() if "probed" in key}
    assert apart == {
        "probed/chosen": 1.5, "probed/rejected": -0.5, "unprobed/chosen": 6.0, "unprobed/rejected": -5.0,
    }  # fmt: skip
    assert not any("probed" in key for key in displacement_row(*z, start, start))
    everything = displacement_row(*z, start, start, num_probed=32)
    assert "unprobed/chosen" not in everything
    assert everything["probed/chosen"] == 3.0
