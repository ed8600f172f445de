"""The band, the EMA and alpha: numbers by hand, and one real gradient step at the centre of a real band."""

import json
import math

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import make_llama
from rcpo.config.calibration import CalibrationConfig
from rcpo.method.band import Band, disentanglement_band
from rcpo.method.calibrators import BandCalibration, FixedCalibration, StepStatistics, build_calibrator
from rcpo.method.incentives import incentives
from rcpo.method.metrics import band_metrics
from rcpo.method.scores import ScoreGeometry
from rcpo.objectives import PairLogProbs, load_objective

GEOMETRY = ScoreGeometry(chosen_squared=4.0, rejected_squared=16.0, dot=4.0)
"""|s_w| = 2, |s_l| = 4, rho = 4/8 = 1/2, r* = 4/2 = 2."""
STEP = 5e-3
"""Nats that a step of a real model moves z by, about: far above fp32 rounding (a Llama's norm is fp32 even in
a model in fp64), small enough for the first order (measured: within .1 %)."""


def calibration(max_log_alpha: float = 3.0, ema_beta: float = 0.98, every: int = 1) -> BandCalibration:
    return BandCalibration(ema_beta=ema_beta, max_log_alpha=max_log_alpha, every=every)


def with_center(center: float) -> ScoreGeometry:
    """rho = 1/2 and log r* = `center`."""
    return ScoreGeometry(1.0, math.exp(2 * center), 0.5 * math.exp(center))


def test_band_by_hand() -> None:
    """r = 3 and alpha = e^.1: position log 3 + .2, centre log 2, half-width log 2, edges 0 and log 4,
    slack log 2 - |log 3 + .2 - log 2| = log(4/3) - .2 = .0877 (inside). With alpha = 1.5 the position is
    log 6.75, beyond log 4 by .5232."""
    band = disentanglement_band(math.log(3), math.exp(0.1), GEOMETRY)
    assert band is not None
    assert band.position == pytest.approx(math.log(3) + 0.2)
    assert band.center == pytest.approx(math.log(2))
    assert band.half_width == pytest.approx(math.log(2))
    assert band.lower == pytest.approx(0, abs=1e-15)
    assert band.upper == pytest.approx(math.log(4))
    assert band.slack == pytest.approx(math.log(4 / 3) - 0.2)
    outside = disentanglement_band(math.log(3), 1.5, GEOMETRY)
    assert outside is not None
    assert outside.slack == pytest.approx(-math.log(6.75 / 4))


@pytest.mark.parametrize("dot", [0.0, -4.0])
def test_without_a_positive_rho_every_ratio_is_inside(dot: float) -> None:
    """rho <= 0: half-width +inf, and the centre is where it was; never |rho|."""
    band = disentanglement_band(100.0, 1.0, ScoreGeometry(4.0, 16.0, dot))
    assert band == Band(100.0, pytest.approx(math.log(2)), math.inf)
    assert (band.lower, band.upper, band.slack) == (-math.inf, math.inf, math.inf)


@pytest.mark.parametrize(
    "squares",
    [(0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (math.nan, 1.0, 0.5), (1.0, math.inf, 0.5), (1.0, 1.0, math.nan)],
)
def test_a_score_that_is_zero_or_not_finite_has_no_band(squares: tuple[float, float, float]) -> None:
    """Such a step is counted as skipped and leaves alpha at 1."""
    geometry = ScoreGeometry(*squares)
    assert disentanglement_band(0.0, 1.0, geometry) is None
    calibrator = calibration()
    calibrator.update(StepStatistics(1.0, 2.0, geometry))
    assert calibrator.alpha() == 1
    assert calibrator.counts() == {"calibration/skipped": 1, "calibration/clamped": 0}


def test_ema_starts_as_a_running_mean() -> None:
    """log r = 0 throughout, log r* = 1, 2, 6: EMA 1, 1.5, 3 (means), then with ema_beta = .7 < 3/4 the
    fourth, log r* = 10, gives .7 * 3 + .3 * 10 = 5.1. alpha lags by one step: 1, e^.5, e^.75, e^1.5,
    e^2.55."""
    calibrator = calibration(ema_beta=0.7)
    alphas = [calibrator.alpha()]
    for center in (1.0, 2.0, 6.0, 10.0):
        calibrator.update(StepStatistics(0.3, 0.3, with_center(center)))
        alphas.append(calibrator.alpha())
    assert [math.log(alpha) for alpha in alphas] == pytest.approx([0, 0.5, 0.75, 1.5, 2.55])
    assert calibrator.metrics() == {
        "calibration/position_ema": pytest.approx(0, abs=1e-15),
        "calibration/center_ema": pytest.approx(5.1),
    }


def test_alpha_moves_the_ratio_to_the_center() -> None:
    """log r = log .5, log r* = log 2: alpha = sqrt(4) = 2, and the ratio .5 * alpha^2 = 2 = r*."""
    calibrator = calibration()
    calibrator.update(StepStatistics(0.2, 0.4, GEOMETRY))
    assert calibrator.alpha() == pytest.approx(2)
    band = disentanglement_band(math.log(0.5), calibrator.alpha(), GEOMETRY)
    assert band is not None
    assert band.position == pytest.approx(band.center)


@pytest.mark.parametrize(("ratio", "is_center"), [(2.0, True), (1.9, False), (2.1, False), (0.5, False)])
def test_alpha_is_one_only_at_the_center(ratio: float, is_center: bool) -> None:
    """r* = 2."""
    calibrator = calibration()
    calibrator.update(StepStatistics(0.1 * ratio, 0.1, GEOMETRY))
    assert (calibrator.alpha() == pytest.approx(1, abs=1e-12)) is is_center


def test_swapping_the_sides_inverts_alpha() -> None:
    """d_w with d_l and s_w with s_l exchanged: 1/alpha, over several steps."""
    calibrator, swapped = calibration(), calibration()
    for d_w, d_l, squares in ((0.3, 0.5, (4, 9, 2)), (0.1, 0.7, (2, 5, -1)), (0.4, 0.2, (1, 1, 1))):
        chosen, rejected, dot = squares
        calibrator.update(StepStatistics(d_w, d_l, ScoreGeometry(chosen, rejected, dot)))
        swapped.update(StepStatistics(d_l, d_w, ScoreGeometry(rejected, chosen, dot)))
        assert calibrator.alpha() != 1
        assert swapped.alpha() == pytest.approx(1 / calibrator.alpha(), rel=1e-12)


@pytest.mark.parametrize(
    ("mean_d_w", "mean_d_l"),
    [(0.0, 0.1), (-0.1, 0.1), (0.1, 0.0), (0.1, -2.0), (math.nan, 0.1), (0.1, math.inf)],
)
def test_a_step_without_positive_finite_means_is_skipped(mean_d_w: float, mean_d_l: float) -> None:
    """It is counted, and the EMA keeps what the step before gave."""
    calibrator = calibration()
    calibrator.update(StepStatistics(0.2, 0.4, GEOMETRY))
    calibrator.update(StepStatistics(mean_d_w, mean_d_l, GEOMETRY))
    assert calibrator.alpha() == pytest.approx(2)
    assert calibrator.num_updates == 1
    assert calibrator.counts()["calibration/skipped"] == 1


def test_clamped_steps_are_counted_and_alpha_is_limited() -> None:
    """log r* = 8, log r = 0 asks for log alpha = 4, limit 3: steps 1 and 2 run at e^3 and count; step 0 ran
    at 1. Below, log r* = -8 in the mirror."""
    for sign in (1, -1):
        calibrator = calibration(max_log_alpha=3.0)
        counts = []
        for _ in range(3):
            calibrator.update(StepStatistics(1.0, 1.0, with_center(8.0 * sign)))
            counts.append(calibrator.num_clamped)
        assert counts == [0, 1, 2]
        assert math.log(calibrator.alpha()) == pytest.approx(3.0 * sign)


def test_steps_without_a_measurement_keep_alpha_but_count_their_clamps() -> None:
    """every = 3 measures steps 0, 3, 6; between them nothing is skipped, the EMA rests, the limit still
    counts."""
    calibrator = calibration(max_log_alpha=1.0, every=3)
    assert [step for step in range(8) if calibrator.measures_at(step)] == [0, 3, 6]
    calibrator.update(StepStatistics(1.0, 1.0, with_center(8.0)))
    for _ in range(2):
        calibrator.update(StepStatistics(1.0, 1.0, None))
    assert (calibrator.num_updates, calibrator.num_skipped, calibrator.num_clamped) == (1, 0, 2)


def test_a_measurement_counts_for_the_steps_since_the_one_before() -> None:
    """Centres 1 and then 4: a running mean, 2.5. Then ema_beta .5 looks back less far: after three steps
    .5^3 * 2.5 + (1 - .5^3) * 8."""
    calibrator = calibration(ema_beta=0.98, every=3)
    calibrator.update(StepStatistics(1.0, 1.0, with_center(1.0)))
    assert calibrator.center_ema == pytest.approx(1.0)
    for geometry in (None, None, with_center(4.0)):
        calibrator.update(StepStatistics(1.0, 1.0, geometry))
    assert calibrator.center_ema == pytest.approx(2.5)
    calibrator.ema_beta = 0.5
    for geometry in (None, None, with_center(8.0)):
        calibrator.update(StepStatistics(1.0, 1.0, geometry))
    assert calibrator.center_ema == pytest.approx(0.125 * 2.5 + 0.875 * 8)


def test_measurements_that_were_not_asked_for_change_nothing() -> None:
    """metrics.geometry_every may measure more often than the calibrator does."""
    plain, looked_at = calibration(every=3), calibration(every=3)
    for step in range(10):
        geometry = with_center(math.sin(step))
        plain.update(StepStatistics(1.0, 1.0, geometry if plain.measures_at(step) else None))
        looked_at.update(StepStatistics(1.0, 1.0, geometry))
    assert looked_at == plain


def test_a_constant_measurement_gives_the_same_alpha_whatever_every_is() -> None:
    """And one that jumps is followed at the same pace: after 24 steps both EMAs have moved equally far."""
    often, seldom = calibration(ema_beta=0.9, every=1), calibration(ema_beta=0.9, every=8)
    for step in range(100):
        center = 0.0 if step < 73 else 1.0
        for calibrator in (often, seldom):
            measured = with_center(center) if calibrator.measures_at(step) else None
            calibrator.update(StepStatistics(1.0, 1.0, measured))
        if step == 96:  # both have just measured, 24 steps after the jump
            assert often.center_ema == pytest.approx(1 - 0.9**24)
            assert seldom.center_ema == pytest.approx(often.center_ema)


def test_state_survives_json_bit_for_bit() -> None:
    """The two calibrators agree exactly after the round trip, and after one more step each."""
    first, second = calibration(ema_beta=0.9), calibration(ema_beta=0.9)
    for step in range(15):
        first.update(StepStatistics(0.1 + step / 7, -1.0 if step == 4 else 0.3, with_center(math.sin(step))))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second == first
    assert first.num_skipped == 1
    for calibrator in (first, second):
        calibrator.update(StepStatistics(0.7, 0.9, GEOMETRY))
    assert second.alpha() == first.alpha()


def test_off_is_plain_training_whatever_it_sees() -> None:
    """alpha is exactly 1, nothing is measured, nothing is kept."""
    off = build_calibrator(CalibrationConfig(name="off"))
    assert isinstance(off, FixedCalibration)
    off.update(StepStatistics(0.2, 0.4, GEOMETRY))
    assert (off.alpha(), off.measures_at(0), off.state_dict(), off.metrics(), off.counts()) == (
        1,
        False,
        {},
        {},
        {},
    )


def test_on_is_built_with_the_configs_values() -> None:
    config = CalibrationConfig(name="on", ema_beta=0.5, max_log_alpha=2.0, every=4)
    assert build_calibrator(config) == BandCalibration(ema_beta=0.5, max_log_alpha=2.0, every=4)


def scaled_sides(alpha: float) -> tuple[Tensor, Tensor, PairLogProbs, Tensor]:
    """(loss, gradients (2, 3) of the calibrated surrogate with respect to z_w and z_l, pair, plain incentives
    (2, 3))."""
    objective = load_objective("simpo")
    z_w = torch.tensor([-3.0, -5.0, -1.0], dtype=torch.float64, requires_grad=True)
    z_l = torch.tensor([-4.0, -2.0, -6.0], dtype=torch.float64, requires_grad=True)
    lengths, zeros = torch.full_like(z_w, 2).detach(), torch.zeros_like(z_w).detach()
    pair = PairLogProbs(z_w, z_l, zeros, zeros, lengths, lengths)
    d_w, d_l = incentives(objective, pair)
    surrogate = (-alpha * d_w * z_w + d_l / alpha * z_l).sum()
    gradients = torch.stack(torch.autograd.grad(surrogate, (z_w, z_l)))
    return objective(pair).detach(), gradients, pair, torch.stack([d_w, d_l])


def test_calibration_keeps_the_loss_and_the_product_of_the_sides() -> None:
    """Side gradients scale by alpha and 1/alpha; d_w d_l and the loss stay; alpha = 1 is the loss's own
    gradient."""
    plain_loss, plain, pair, (d_w, d_l) = scaled_sides(1.0)
    own = torch.autograd.grad(load_objective("simpo")(pair).sum(), (pair.z_w, pair.z_l))
    torch.testing.assert_close(plain, torch.stack(own), rtol=1e-12, atol=0)
    loss, gradients, _, _ = scaled_sides(1.7)
    assert torch.equal(loss, plain_loss)
    torch.testing.assert_close(gradients, torch.stack([-1.7 * d_w, d_l / 1.7]), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients.prod(0), plain.prod(0), rtol=1e-12, atol=0)


class OnePair:
    """A real pair under a real model in fp64, with the scores of all parameters by autograd."""

    CHOSEN_IDS, REJECTED_IDS = [1, 7, 9, 12, 20, 5], [1, 7, 9, 12, 21, 5]  # prompt 1 7 9, one token differs

    def __init__(self) -> None:
        self.parameters = list((model := make_llama(seed=1).double()).parameters())
        self.model = model
        self.s_w, self.s_l = (torch.autograd.grad(z, self.parameters) for z in self.z())
        w, s = (torch.cat([part.flatten() for part in side]) for side in (self.s_w, self.s_l))
        self.geometry = ScoreGeometry(float(w @ w), float(s @ s), float(w @ s))

    def z(self) -> list[Tensor]:
        sums = []
        for ids in (self.CHOSEN_IDS, self.REJECTED_IDS):
            row = torch.tensor([ids])
            logps = self.model(input_ids=row).logits[0].log_softmax(-1)
            sums.append(logps[torch.arange(2, 5), row[0, 3:]].sum())
        return sums

    def change(self, d_w: float, d_l: float, lr: float) -> tuple[float, float]:
        """(dz_w, dz_l) / lr after one plain-gradient step on -d_w z_w + d_l z_l; the weights are put back."""
        before = [z.item() for z in self.z()]
        with torch.no_grad():
            saved = [parameter.clone() for parameter in self.parameters]
            for parameter, s_w, s_l in zip(self.parameters, self.s_w, self.s_l, strict=True):
                parameter += lr * (d_w * s_w - d_l * s_l)
            after = [z.item() for z in self.z()]
            for parameter, value in zip(self.parameters, saved, strict=True):
                parameter.copy_(value)
        return (after[0] - before[0]) / lr, (after[1] - before[1]) / lr


@pytest.mark.parametrize("log_offset", [-2.5, 0.0, 2.5])
def test_a_step_at_the_center_raises_the_chosen_and_lowers_the_rejected(log_offset: float) -> None:
    """Invariant 5: whatever the incentives were, after calibration z_w rises and z_l falls, at the predicted
    rates."""
    pair = OnePair()
    assert 0 < pair.geometry.cosine < 1
    d_w, d_l = 0.5 * math.exp(log_offset), 0.5
    calibrator = calibration(max_log_alpha=10)
    statistics = StepStatistics(d_w, d_l, pair.geometry)
    calibrator.update(statistics)
    alpha = calibrator.alpha()
    row = band_metrics(statistics, alpha)
    lr = STEP / math.sqrt(pair.geometry.chosen_squared * pair.geometry.rejected_squared)
    dz_w, dz_l = pair.change(alpha * d_w, d_l / alpha, lr)
    assert dz_w > 0 > dz_l
    assert dz_w == pytest.approx(row["dynamics/chosen_rate"], rel=0.02)
    assert dz_l == pytest.approx(row["dynamics/rejected_rate"], rel=0.02)
    assert row["dynamics/pathway"] == 0


@pytest.mark.parametrize(("beyond", "falls", "rises"), [(-0.3, True, False), (0.3, False, True)])
def test_outside_the_band_one_side_goes_the_wrong_way(beyond: float, falls: bool, rises: bool) -> None:
    """Below the lower edge chosen falls; above the upper edge rejected rises: the edges are where the
    theory says."""
    pair = OnePair()
    band = disentanglement_band(0.0, 1.0, pair.geometry)
    assert band is not None
    d_w = math.exp((band.lower if beyond < 0 else band.upper) + beyond)
    lr = STEP / math.sqrt(pair.geometry.chosen_squared * pair.geometry.rejected_squared) / max(d_w, 1)
    dz_w, dz_l = pair.change(d_w, 1.0, lr)
    assert (dz_w < 0, dz_l > 0) == (falls, rises)
