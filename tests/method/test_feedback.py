"""Feedback and fixed alpha: updates worked by hand, limits, where the measurement comes from, and what every
calibration option builds."""

import dataclasses
import json
import math

import pytest

from rcpo.config.calibration import CalibrationConfig, FeedbackConfig
from rcpo.config.compose import compose
from rcpo.config.validate import validate
from rcpo.method.band import disentanglement_band
from rcpo.method.calibrators import (
    BalanceCalibration,
    BandCalibration,
    Calibrator,
    FeedbackCalibration,
    FixedCalibration,
    Probe,
    StepStatistics,
    build_calibrator,
)
from rcpo.method.scores import ScoreGeometry


def loop(
    *,
    gain: float = 0.1,
    integral_gain: float = 0.01,
    smoothing: float = 0.5,
    target: float = 0.0,
    low: float = -1.0,
    high: float = 1.0,
    every: int = 2,
    num_fresh_steps: int = 1000,
    from_probe: bool = False,
) -> FeedbackCalibration:
    return FeedbackCalibration(
        gain, integral_gain, smoothing, target, low, high, every, num_fresh_steps, from_probe
    )


def seen(batch: float, probe: float | None = None) -> StepStatistics:
    """A step whose batch mean of r_w, and probe mean where one was asked for, are these."""
    both = None if probe is None else Probe(probe, math.nan)
    return StepStatistics(0.1, 0.1, None, mean_r_w=batch, probe=both)


def test_updates_by_hand() -> None:
    """smoothing .5, gain .1, integral gain .01. r = -1: e = -.5, integral .005, log alpha .005 + .05 = .055.
    r = -1: e = -.75, integral .0125, log alpha .0875. r = 1.25: e = .25, integral .01, log alpha -.015."""
    calibrator = loop()
    log_alphas = [math.log(calibrator.alpha())]
    for measured in (-1.0, -1.0, 1.25):
        calibrator.update(seen(measured))
        log_alphas.append(math.log(calibrator.alpha()))
    assert log_alphas == pytest.approx([0, 0.055, 0.0875, -0.015])
    assert calibrator.metrics() == {"calibration/measured": 1.25}
    assert calibrator.counts() == {"calibration/skipped": 0, "calibration/clamped": 0}


def test_the_target_is_what_displacement_is_held_at() -> None:
    """r = target moves nothing; r = target - 1 moves as r = -1 does with target 0."""
    calibrator = loop(target=3.0)
    calibrator.update(seen(3.0))
    assert calibrator.alpha() == 1
    calibrator.update(seen(2.0))
    assert math.log(calibrator.alpha()) == pytest.approx(0.055)


@pytest.mark.parametrize(("measured", "log_alpha"), [(-50.0, 0.275), (50.0, -0.275)])
def test_one_measurement_counts_for_five_nats_at_most(measured: float, log_alpha: float) -> None:
    """r = -50 counts as -5: e = -2.5, integral .025, log alpha .275. With the default constants such a batch
    moves log alpha by .05 + .0025: gain .1 and integral gain .005 times (1 - .9) 5."""
    calibrator = loop()
    calibrator.update(seen(measured))
    assert math.log(calibrator.alpha()) == pytest.approx(log_alpha)
    assert calibrator.metrics() == {"calibration/measured": measured}
    default = build_calibrator(CalibrationConfig(name="feedback"), 10)
    default.update(seen(-50.0))
    assert math.log(default.alpha()) == pytest.approx(0.0525)


def test_limits_cut_log_alpha_and_the_integral_and_each_cut_is_counted() -> None:
    """No smoothing, gain 0, integral gain .25, limits 0 and .4. r = 1 asks for -.25: 0, counted. r = -1: .25.
    r = -1 asks for .5: .4, counted. r = 1: .15 at once, for the integral had stopped at .4, not at .5."""
    calibrator = loop(gain=0.0, integral_gain=0.25, smoothing=0.0, low=0.0, high=0.4)
    found = []
    for measured in (1.0, -1.0, -1.0, 1.0):
        calibrator.update(seen(measured))
        found.append((round(math.log(calibrator.alpha()), 9), calibrator.counts()["calibration/clamped"]))
    assert found == [(0, 1), (0.25, 1), (0.4, 2), (0.15, 2)]


def test_the_proportional_part_is_limited_and_counted_too() -> None:
    """gain 1, no integral, limits 0 and .4: r = 1 and r = -1 ask for -1 and 1; r = -.25 asks for .25."""
    calibrator = loop(gain=1.0, integral_gain=0.0, smoothing=0.0, low=0.0, high=0.4)
    found = []
    for measured in (1.0, -1.0, -0.25):
        calibrator.update(seen(measured))
        found.append((round(math.log(calibrator.alpha()), 9), calibrator.counts()["calibration/clamped"]))
    assert found == [(0, 1), (0.4, 2), (0.25, 2)]


def test_measures_on_new_pairs_and_then_on_the_probe_which_counts_for_the_steps_between() -> None:
    """Three steps of new pairs, then the probe before steps 4, 6, 8 (counted from 0, every 2). smoothing .5,
    gain .1, integral gain .01: r = -1 in step 0, then 0 twice: e = -.125, integral .00875. Step 3 trains on
    known pairs and says nothing. Probe r = -1 in step 4: e = .25 * -.125 - .75 = -.78125, integral .00875 +
    2 * .0078125, log alpha .0243750 + .078125."""
    calibrator = loop(num_fresh_steps=3)
    assert [step for step in range(9) if calibrator.probes_at(step)] == [4, 6, 8]
    for measured in (-1.0, 0.0, 0.0):
        calibrator.update(seen(measured))
    before = calibrator.alpha()
    assert math.log(before) == pytest.approx(0.00875 + 0.0125)
    calibrator.update(seen(-2.0))
    assert calibrator.alpha() == before
    calibrator.update(seen(-2.0, probe=-1.0))
    assert math.log(calibrator.alpha()) == pytest.approx(0.024375 + 0.078125)
    assert calibrator.metrics() == {"calibration/measured": -1.0}
    assert not any(calibrator.measures_at(step) for step in range(9))


def test_with_the_probe_as_source_batches_say_nothing() -> None:
    """From step 0 on."""
    calibrator = loop(from_probe=True)
    assert [step for step in range(6) if calibrator.probes_at(step)] == [0, 2, 4]
    calibrator.update(seen(-2.0, probe=0.0))
    calibrator.update(seen(-2.0))
    assert calibrator.alpha() == 1
    calibrator.update(seen(0.0, probe=-1.0))
    assert math.log(calibrator.alpha()) == pytest.approx(0.02 * 0.75 + 0.1 * 0.75)


@pytest.mark.parametrize("measured", [math.nan, math.inf, -math.inf])
def test_a_measurement_that_is_not_finite_is_skipped_and_counted(measured: float) -> None:
    calibrator = loop()
    calibrator.update(seen(-1.0))
    calibrator.update(seen(measured))
    assert math.log(calibrator.alpha()) == pytest.approx(0.055)
    assert calibrator.counts()["calibration/skipped"] == 1
    assert calibrator.metrics() == {"calibration/measured": -1.0}


@pytest.mark.parametrize("kind", ["feedback", "exact", "fixed"])
@pytest.mark.parametrize("stopped_at", [0, 1, 5, 9])
def test_a_calibrator_restored_mid_run_goes_on_as_the_one_never_stopped(kind: str, stopped_at: int) -> None:
    """Alpha, metrics and counts of every later step, exactly, through JSON; over the change from new pairs to
    the probe (step 6), a limit and a skip."""

    def make() -> Calibrator:
        if kind == "feedback":
            return loop(num_fresh_steps=6, low=0.0, high=0.1)
        if kind == "fixed":
            return FixedCalibration(1.05)
        return BandCalibration(ema_beta=0.7, max_log_alpha=0.3, every=2, warmup_steps=3)

    def statistics(step: int) -> StepStatistics:
        measured = math.nan if step == 3 else math.sin(step) - 0.5
        geometry = ScoreGeometry(1.0, math.exp(math.cos(step)), 0.1, weighted=True)
        measures, probes = make().measures_at(step), make().probes_at(step)
        probe = Probe(math.cos(step), math.sin(step)) if probes else None
        return StepStatistics(0.2, 0.3, geometry if measures else None, measured, probe)

    def told(calibrator: Calibrator) -> tuple[float, dict[str, float], dict[str, float]]:
        return calibrator.alpha(), calibrator.metrics(), calibrator.counts()

    whole, stopped = make(), make()
    rows = []
    for step in range(14):
        whole.update(statistics(step))
        rows.append(told(whole))
    for step in range(stopped_at):
        stopped.update(statistics(step))
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict(), allow_nan=False)))
    for step in range(stopped_at, 14):
        resumed.update(statistics(step))
        assert told(resumed) == rows[step]
    assert kind == "fixed" or len({alpha for alpha, _, _ in rows}) > 5


def test_fixed_alpha_is_the_configs_whatever_it_sees() -> None:
    fixed = build_calibrator(CalibrationConfig(name="fixed", alpha=1.05))
    for measured in (-5.0, 5.0):
        fixed.update(dataclasses.replace(seen(measured, probe=measured), geometry=ScoreGeometry(1, 9, 2)))
    assert fixed.alpha() == 1.05
    assert not fixed.measures_at(0)
    assert not fixed.probes_at(0)
    assert (fixed.metrics(), fixed.counts()) == ({}, {})


def test_the_weighted_band_lies_around_equal_norms() -> None:
    """|G_w| = 2, |G_l| = 6, dot 3, so rho = 1/4: position log(2/6) whatever the mean incentives, centre 0,
    half-width log 4, slack log(4/3): inside. alpha = sqrt 3 gives both halves the norm 2 sqrt 3: position
    0."""
    geometry = ScoreGeometry(4.0, 36.0, 3.0, weighted=True)
    band = disentanglement_band(5.0, 1.0, geometry)
    assert band is not None
    assert band.position == pytest.approx(math.log(2 / 6))
    assert band.center == 0
    assert band.half_width == pytest.approx(math.log(4))
    assert band.slack == pytest.approx(math.log(4 / 3))
    calibrator = BandCalibration(ema_beta=0.98, max_log_alpha=3.0, every=1)
    calibrator.update(StepStatistics(0.7, 0.1, geometry))
    alpha = calibrator.alpha()
    assert alpha == pytest.approx(math.sqrt(3))
    assert alpha * 2 == pytest.approx(6 / alpha)
    centred = disentanglement_band(5.0, alpha, geometry)
    assert centred is not None
    assert centred.position == pytest.approx(0, abs=1e-12)


def test_the_first_steps_are_all_measured_then_every_so_many() -> None:
    calibrator = BandCalibration(ema_beta=0.98, max_log_alpha=3.0, every=4, warmup_steps=6)
    assert [step for step in range(14) if calibrator.measures_at(step)] == [0, 1, 2, 3, 4, 5, 8, 12]


BUILT: dict[str, Calibrator] = {
    "off": FixedCalibration(1.0),
    "fixed": FixedCalibration(1.3),
    "on": BandCalibration(ema_beta=0.98, max_log_alpha=3.0, every=8, warmup_steps=50),
    "exact": BandCalibration(ema_beta=0.9975, max_log_alpha=3.0, every=8, warmup_steps=50),
    "feedback": FeedbackCalibration(
        gain=0.1, integral_gain=0.005, smoothing=0.9, target=0.0, low=0.0, high=3.0, every=10,
        num_fresh_steps=7, from_probe=False,
    ),
    "balance": BalanceCalibration(limit=2.0, every=5, momentum=0.9),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT)
def test_every_option_of_conf_builds_its_calibrator(name: str) -> None:
    """In a run of seven steps of new pairs."""
    words = [f"calibration={name}", *(["calibration.alpha=1.3"] if name == "fixed" else [])]
    tree = compose([*words, "tracking=none"])
    assert tree is not None
    assert repr(build_calibrator(validate(tree).calibration, 7)) == repr(BUILT[name])  # repr: nan equals nan


def test_feedback_is_built_with_the_configs_values() -> None:
    """high: its own where there is one, else max_log_alpha."""
    feedback = FeedbackConfig(
        gain=0.3, integral_gain=0.2, smoothing=0.7, target=1.5, low=-0.5, source="probe", every=3
    )
    config = CalibrationConfig(name="feedback", max_log_alpha=2.0, feedback=feedback)
    built = build_calibrator(config, 4)
    assert repr(built) == repr(FeedbackCalibration(0.3, 0.2, 0.7, 1.5, -0.5, 2.0, 3, 4, True))
    limited = dataclasses.replace(config, feedback=dataclasses.replace(feedback, high=0.25))
    assert isinstance(built := build_calibrator(limited), FeedbackCalibration)
    assert built.high == 0.25
