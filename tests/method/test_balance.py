"""calibration=balance: numbers by hand and by dense conditioning, the loop against simulated plants."""

import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from helpers.plain_balance import PlainBalance
from rcpo.method.balance import POLE, STRENGTHS, BalanceCalibration
from rcpo.method.statistics import Probe, StepStatistics


def seen(c: float | None, lr_share: float = 1.0) -> StepStatistics:
    """A step before which the middle of both sides was at `c`; they lie 2 nats apart."""
    probe = None if c is None else Probe(c + 1, c - 1)
    return StepStatistics(0.1, 0.1, None, probe=probe, lr_share=lr_share)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_alpha_is_what_dense_conditioning_says(momentum: float) -> None:
    """12 steps, measured before 1, 2, 4, 6, 8 and 10, in a warm-up of the learning rate: to 1e-6 each."""
    ours, plain = BalanceCalibration(1.0, 3, momentum), PlainBalance(momentum)
    measurements, moved = iter([-0.3, -0.5, -0.9, -1.5, -1.4, -1.2]), 0.0
    for step in range(12):
        c = next(measurements) if ours.probes_at(step) else None
        share = min(1.0, (step + 1) / 4)
        ours.update(seen(c, share))
        plain.step(c, share)
        assert math.log(ours.alpha()) == pytest.approx(plain.log_alpha, abs=1e-6)
        moved = max(moved, abs(plain.log_alpha))
    assert moved > 0.05


def test_the_first_answers_by_hand() -> None:
    """Nothing measured: alpha 1. A fall raises alpha, a rise lowers it, by the same log."""
    falling, rising = BalanceCalibration(1.0, 5, 0.9), BalanceCalibration(1.0, 5, 0.9)
    for step in range(6):
        for calibrator, c in ((falling, -0.5), (rising, 0.5)):
            calibrator.update(seen(c if step == 5 else None))
        if step < 5:
            assert falling.alpha() == rising.alpha() == 1
    assert falling.alpha() > 1.02
    assert math.log(rising.alpha()) == pytest.approx(-math.log(falling.alpha()))


def test_both_poles_are_where_the_law_puts_them() -> None:
    """c' = c + k (m' - u*), m' - u* = b (m - u*) + (1 - b)(u - u*) with the law's u, at b = .9: a = .4 and
    g = 2.6, so the matrix of (c/k, m - u*) is [[.96, .64], [-.04, .64]]: trace 1.6, determinant .64, both
    eigenvalues .8."""
    a, g = (1 - POLE) ** 2 / 0.1, (0.9 - POLE**2) / 0.1
    assert (a, g) == pytest.approx((0.4, 2.6))
    loop = np.array([[1 - 0.1 * a, 0.9 - 0.1 * g], [-0.1 * a, 0.9 - 0.1 * g]])
    assert loop == pytest.approx(np.array([[0.96, 0.64], [-0.04, 0.64]]))
    assert np.abs(np.linalg.eigvals(loop)) == pytest.approx([0.8, 0.8], abs=1e-6)


class Plant:
    """c' = c + gain(t) (k (m + drift(t)) + noise), m the mean of log alpha with Adam's bias correction."""

    def __init__(self, k: float, noise: float, drift: Callable[[int], float], seed: int) -> None:
        self.k, self.noise, self.drift = k, noise, drift
        self.draw = np.random.default_rng(seed)

    def run(
        self,
        calibrator: BalanceCalibration | None,
        num_steps: int = 100,
        momentum: float = 0.9,
        delay: int = 0,
    ) -> tuple[list[float], list[float]]:
        """c before every step, in units of k, and log alpha, which acts `delay` steps later than known."""
        c, top, bottom = 0.0, 0.0, 0.0
        cs, log_alphas = [], []
        for step in range(num_steps):
            log_alpha = 0.0 if calibrator is None else math.log(calibrator.alpha())
            cs.append(c / self.k)
            log_alphas.append(log_alpha)
            if calibrator is not None:
                calibrator.update(seen(c if calibrator.probes_at(step) else None))
            top, bottom = momentum * top + log_alphas[max(0, step - delay)], momentum * bottom + 1
            c += self.k * (top / bottom + self.drift(step) + self.noise * self.draw.normal())
        return cs, log_alphas


def dpo(step: int) -> float:
    """Both sides fall, ever faster: alpha 1.02 to 1.04 would hold them."""
    return -0.02 - 0.02 * step / 100


def simpo(step: int) -> float:
    """Both rise at first, and fall at the end: from .87 to 1.04."""
    return 0.14 * (1 - step / 80)


def toy(step: int) -> float:
    """Both fall fast: 1.42, later 1.28."""
    return -0.35 if step < 60 else -0.25


@pytest.mark.parametrize("k", [0.01, 0.1, 1.2, 10.0, 100.0])
@pytest.mark.parametrize(
    ("drift", "worst", "spread"), [(dpo, 0.5, 0.42), (simpo, 2.3, 0.55), (toy, 2.0, 0.65)]
)
def test_the_loop_settles_without_swinging_for_every_plant(
    k: float, drift: Callable[[int], float], worst: float, spread: float
) -> None:
    """Four decades of k, noise .1 k a step, 8 seeds. In units of k: the largest excursion of the mean path is
    below `worst`, the spread over steps 60 to 100 about `spread` (the noise alone would give .1 sqrt(100) =
    1), and log alpha ends at what holds c, not swinging about it."""
    paths = [Plant(k, 0.1, drift, seed).run(BalanceCalibration(1.0, 5, 0.9)) for seed in range(8)]
    cs = np.array([path[0] for path in paths])
    late = np.array([path[1][80:] for path in paths])
    assert np.abs(cs.mean(axis=0)).max() < worst
    assert np.sqrt((cs[:, 60:] ** 2).mean()) < spread
    holding = -np.mean([drift(step) for step in range(80, 100)])
    assert late.mean() == pytest.approx(holding, abs=0.06)
    assert late.std() < 0.14
    uncalibrated = Plant(k, 0.0, drift, 0).run(None)[0]
    assert np.abs(uncalibrated).max() > 2  # or there was nothing to settle


@pytest.mark.parametrize("k", [0.01, 0.5, 10.0])
def test_what_lifts_both_sides_at_once_is_back_by_step_32(k: float) -> None:
    """As cpo does on real weights: e^-.86 would hold it from the first step on. In units of k: below 6 at the
    worst, and below .3 on average from step 32 on."""
    paths = [
        Plant(k, 0.1, lambda step: 0.86, seed).run(BalanceCalibration(2.0, 5, 0.9), 80) for seed in range(8)
    ]
    cs = np.abs([path[0] for path in paths])
    assert cs.mean(axis=0).max() < 6
    assert cs[:, 32:].mean() < 0.3
    assert np.mean([path[1][60:] for path in paths]) == pytest.approx(-0.86, abs=0.05)


def test_what_turns_round_within_twenty_steps_is_back_by_step_40() -> None:
    """As simpo does on real weights with 32 pairs a step: e^-.2 would hold it at first, 1 from step 22 on. In
    units of k, the mean path goes .72 away and is below .15 from step 40 on. With poles at .85 it is 1.04 and
    .42, with a probe every 5 steps from the start .98 and .25, with both 1.33 and .58."""

    def turning(step: int) -> float:
        return float(np.interp(step, [0, 8, 13, 18, 23, 28], [0.2, 0.18, 0.08, 0.06, -0.02, -0.03]))

    paths = [Plant(1.0, 0.04, turning, seed).run(BalanceCalibration(2.0, 5, 0.9), 80) for seed in range(8)]
    mean = np.abs(np.mean([path[0] for path in paths], axis=0))
    assert mean.max() < 0.8
    assert mean[40:].max() < 0.2


def test_probes_are_close_together_at_first() -> None:
    """Every 2 steps up to step 28, then as configured; never before step 0; every step if asked."""

    def steps(every: int, num_steps: int) -> list[int]:
        return [step for step in range(num_steps) if BalanceCalibration(1.0, every, 0.9).probes_at(step)]

    assert steps(5, 46) == [1, *range(2, 30, 2), 30, 35, 40, 45]
    assert steps(20, 70) == [1, *range(2, 30, 2), 40, 60]
    assert steps(1, 4) == [1, 2, 3]


@pytest.mark.parametrize(("delay", "momentum"), [(2, 0.9), (0, 0.95), (0, 0.5)])
def test_a_plant_that_is_another_than_thought_settles_too(delay: int, momentum: float) -> None:
    """Two more steps of delay, more momentum, less: log alpha stays near what holds c and c near 0, for
    all drifts."""
    for drift in (dpo, simpo, toy):
        for seed in range(4):
            plant = Plant(1.2, 0.1, drift, seed)
            cs, log_alphas = plant.run(BalanceCalibration(1.0, 5, 0.9), 100, momentum, delay)
            held = [log_alpha + drift(step) for step, log_alpha in enumerate(log_alphas)]
            assert np.sqrt(np.square(held[60:]).mean()) < 0.3
            assert np.sqrt(np.square(cs[60:]).mean()) < 1


def test_without_noise_the_error_goes_and_stays_away() -> None:
    """A constant drift of .1, no noise: after 60 steps |c| < .1 k, and log alpha is within .03 of .1."""
    for k in (0.01, 1.0, 100.0):
        cs, log_alphas = Plant(k, 0.0, lambda step: -0.1, 0).run(BalanceCalibration(1.0, 5, 0.9), 120)
        assert max(abs(c) for c in cs[60:]) < 0.1
        assert log_alphas[60:] == pytest.approx([0.1] * 60, abs=0.03)


def test_the_size_of_nats_does_not_matter() -> None:
    """A plant ten times as strong (four places on the grid) gets the same alphas, but for the probe's own
    rounding and the ends of the grid."""
    first = Plant(1.0, 0.1, simpo, 3).run(BalanceCalibration(1.0, 5, 0.9))[1]
    second = Plant(10.0, 0.1, simpo, 3).run(BalanceCalibration(1.0, 5, 0.9))[1]
    assert second == pytest.approx(first, abs=0.06)
    assert second[40:] == pytest.approx(first[40:], abs=0.02)


def test_the_strength_is_found() -> None:
    """Within a factor of 2, after 100 steps at a drift of .2; it is shown as calibration/strength."""
    for k, seed in itertools.product((0.03, 1.2, 30.0), range(3)):
        calibrator = BalanceCalibration(1.0, 5, 0.9)
        Plant(k, 0.05, toy, seed).run(calibrator)
        assert abs(math.log2(calibrator.metrics()["calibration/strength"] / k)) < 1
    assert STRENGTHS[0, 0, 0] == pytest.approx(1e-4)
    assert STRENGTHS[-1, 0, 0] == pytest.approx(1e3)


def test_what_is_out_of_reach_is_limited_and_counted() -> None:
    """A drift that alpha = e^.3 could hold, and a limit of .1; log alpha never leaves it, nor moves faster
    than .2 a step."""
    calibrator = BalanceCalibration(0.1, 5, 0.9)
    log_alphas = Plant(1.0, 0.0, lambda step: -0.3, 0).run(calibrator)[1]
    assert max(log_alphas) == pytest.approx(0.1)
    assert calibrator.counts()["calibration/clamped"] > 50
    free = Plant(1.0, 0.0, lambda step: -0.3, 0).run(BalanceCalibration(1.0, 5, 0.9))[1]
    assert max(abs(after - before) for before, after in itertools.pairwise(free)) <= 0.2 + 1e-12


def test_a_lost_measurement_is_counted_and_moves_nothing() -> None:
    calibrator = BalanceCalibration(1.0, 1, 0.9)
    calibrator.update(seen(math.nan))
    assert calibrator.alpha() == 1
    assert calibrator.counts() == {"calibration/skipped": 1, "calibration/clamped": 0}
    assert calibrator.metrics() == {}


def test_it_goes_on_from_its_state_bit_for_bit() -> None:
    """Through JSON, between two measurements."""
    whole, first = BalanceCalibration(1.0, 5, 0.9), BalanceCalibration(1.0, 5, 0.9)
    for step in range(23):
        for calibrator in (whole, first):
            calibrator.update(seen(-0.05 * step if step % 5 == 0 else None))
    second = BalanceCalibration(1.0, 5, 0.9)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(23, 50):
        for calibrator in (whole, second):
            calibrator.update(seen(0.02 * step if step % 5 == 0 else None))
        assert second.alpha() == whole.alpha()
        assert second.metrics() == whole.metrics()
    assert second.alpha() != 1
