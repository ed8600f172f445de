"""The paired test against tables, hand-worked numbers and simulated experiments in which nothing is true."""

import math

import numpy as np
import pytest

from rcpo.comparison.statistics import holm, mean_and_error, paired_difference, student_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (30, 2.042), (1000, 1.962), (10**5, 1.960)],
)
def test_students_t_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.05, freedom) == pytest.approx(quantile, abs=6e-4)


def test_students_t_is_exact_where_it_has_a_formula() -> None:
    """One degree of freedom: p = 1 - 2 atan(t) / pi; two: p = 1 - t / sqrt(2 + t^2)."""
    for t in (0.001, 0.5, 3.0, 200.0):
        assert student_quantile(1 - 2 * math.atan(t) / math.pi, 1) == pytest.approx(t, rel=1e-4)
        assert student_quantile(1 - t / math.sqrt(2 + t * t), 2) == pytest.approx(t, rel=1e-3)


def test_the_difference_of_two_seeds_and_three_pairs_by_hand() -> None:
    """delta = [[1, 2, 3], [3, 4, 8]]: over seeds 2, 3, 5.5; over pairs 2, 5; mean 3.5. Squared errors 3.25 /
    3 with two degrees of freedom and 4.5 / 2 with one: their t at 5 % are 4.3027 and 12.7062, their mean with
    these weights (1.08333 * 4.3027 + 2.25 * 12.7062) / 3.33333 = 9.9751, times sqrt(3.33333) = 18.212."""
    found = paired_difference(np.array([[1.0, 2, 3], [3, 4, 8]]))
    assert (found.mean, found.num_seeds, found.num_pairs) == (3.5, 2, 3)
    assert found.se_pairs == pytest.approx(math.sqrt(3.25 / 3))
    assert found.se_seeds == pytest.approx(1.5)
    assert (found.low, found.high) == (pytest.approx(3.5 - 18.212, rel=1e-3), pytest.approx(21.712, rel=1e-3))
    quantiles = [student_quantile(found.p, freedom) for freedom in (2, 1)]
    assert np.average(quantiles, weights=[1.08333, 2.25]) == pytest.approx(3.5 / math.sqrt(10 / 3), rel=1e-3)


def test_the_interval_leaves_out_zero_exactly_where_p_is_below_five_percent() -> None:
    generator = np.random.default_rng(0)
    sides = set()
    for shift in np.linspace(0, 4, 41):
        found = paired_difference(shift + generator.normal(0, 1, (3, 1)) + generator.normal(0, 1, (3, 5)))
        sides.add((found.low > 0 or found.high < 0, found.p < 0.05))
    assert sides == {(True, True), (False, False)}


def test_one_seed_is_the_paired_t_test_over_pairs() -> None:
    """1, 2, 6: mean 3, standard error sqrt(7 / 3) = 1.5275, two degrees of freedom: t = 1.964,
    p = 1 - t / sqrt(2 + t^2) = .1885."""
    found = paired_difference(np.array([[1.0, 2, 6]]))
    assert math.isnan(found.se_seeds)
    assert found.p == pytest.approx(0.1885, abs=1e-4)
    assert found.high == pytest.approx(3 + 4.3027 * math.sqrt(7 / 3), rel=1e-4)


def test_nothing_can_be_said_of_one_pair_and_equal_groups_do_not_differ() -> None:
    assert math.isnan(paired_difference(np.array([[2.0]])).p)
    same = paired_difference(np.zeros((2, 3)))
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    always = paired_difference(np.full((1, 3), 0.5))
    assert (always.low, always.high, always.p) == (0.5, 0.5, 0)


@pytest.mark.parametrize("spread_of_seeds", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("num_seeds", "share"), [(2, 0.065), (3, 0.05), (5, 0.05)])
def test_where_nothing_differs_few_experiments_say_that_something_does(
    num_seeds: int, share: float, spread_of_seeds: float
) -> None:
    """Pairs of spread 2, noise of spread 1, no difference: the share of 400 experiments that find one is at
    most `share`, up to two of its standard errors. Taking all numbers as independent finds far more where
    seeds differ."""
    generator = np.random.default_rng(num_seeds)
    num, careful, pooled = 400, 0, 0
    for _ in range(num):
        delta = generator.normal(0, spread_of_seeds, (num_seeds, 1)) + generator.normal(0, 2, (1, 200))
        delta = delta + generator.normal(0, 1, (num_seeds, 200))
        found = paired_difference(delta)
        careful += found.low > 0 or found.high < 0
        pooled += abs(delta.mean()) > 1.96 * delta.std() / delta.size**0.5
    assert careful / num <= share + 2 * math.sqrt(share * (1 - share) / num)
    assert pooled / num > (0.4 if spread_of_seeds >= 1 else 0.05)


def test_a_difference_beyond_the_noise_of_seeds_and_pairs_is_found() -> None:
    generator = np.random.default_rng(0)
    delta = 5 + generator.normal(0, 0.5, (3, 1)) + generator.normal(0, 2, (3, 200))
    found = paired_difference(delta)
    assert found.p < 0.05
    assert found.low < 5 < found.high


def test_holm_by_hand() -> None:
    """Sorted .01, .02, .03, .5: times 4, 3, 2, 1 is .04, .06, .06, .5, never falling."""
    assert holm([0.5, 0.01, math.nan, 0.03, 0.02])[:2] == pytest.approx([0.5, 0.04])
    assert holm([0.5, 0.01, math.nan, 0.03, 0.02])[3:] == pytest.approx([0.06, 0.06])
    assert math.isnan(holm([math.nan])[0])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_standard_error_of_one_seed_is_unknown() -> None:
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))
    mean, error = mean_and_error([1.0])
    assert mean == 1
    assert math.isnan(error)
