"""Objectives in their tails: finite losses and incentives, and the extensions that make them so."""

import math

import pytest
import torch

from helpers.objective_cases import pair_of
from rcpo.method.incentives import incentives, loss_and_incentives
from rcpo.objectives import REGISTRY, PairLogProbs, load_objective
from rcpo.objectives.numerics import EXPONENT_LIMIT, exp_linear, expm1_linear, sigmoid
from rcpo.objectives.ratio import POLE_GAP
from rcpo.objectives.reference_free import LOG_ODDS_LIMIT, log_odds

NAMES = sorted(REGISTRY)


def loss_of(name: str, pair: PairLogProbs, **params) -> float:
    return load_objective(name, **params)(pair).item()


def extreme_pairs() -> PairLogProbs:
    """fp32, every combination of z and ref in a grid up to +-2000 and of lengths 1 to 4096: r reaches
    +-4000."""
    logps = torch.tensor([-2000.0, -700.0, -100.0, -20.0, -1.0, -1e-3, -1e-8, 0.0, 1e-6, 90.0, 2000.0])
    lengths = torch.tensor([1.0, 37.0, 4096.0])
    return PairLogProbs(*torch.cartesian_prod(*[logps] * 4, *[lengths] * 2).T.contiguous())


@pytest.mark.parametrize("name", NAMES)
def test_finite_in_the_tails(name):
    """Loss and both incentives are finite in fp32 all over the grid."""
    loss, (d_w, d_l) = loss_and_incentives(load_objective(name), extreme_pairs())
    assert loss.isfinite().all()
    assert d_w.isfinite().all()
    assert d_l.isfinite().all()


@pytest.mark.parametrize("name", ["kto", "bco", "acpo"])
def test_finite_with_extreme_states(name):
    loss = load_objective(name)
    for number in (-4000.0, 0.0, 4000.0):
        state = (number,) * len(loss.initial_state(1.0))
        value, (d_w, d_l) = loss_and_incentives(loss, extreme_pairs()._replace(state=state))
        assert (value.isfinite() & d_w.isfinite() & d_l.isfinite()).all()


@pytest.mark.parametrize("name", ["dpo", "kto", "bco", "apo_zero", "exo"])
def test_incentives_survive_rounding(name):
    """At beta r = +-30 the exact incentives are around beta e^-30 = 1e-14; fp32 must agree with fp64, not
    give 0."""
    z = ((100.0, -200.0), (-300.0, 0.0), (300.0, 0.0), (0.0, 300.0), (0.0, -300.0))
    for z_w, z_l in z:
        exact = incentives(load_objective(name), pair_of((z_w, z_l), (0, 0), (5, 5)))
        rounded = incentives(load_objective(name), pair_of((z_w, z_l), (0, 0), (5, 5), dtype=torch.float32))
        for fine, coarse in zip(exact, rounded, strict=True):
            assert fine.abs() > 1e-16
            assert coarse.double().item() == pytest.approx(fine.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("function", "limit"),
    [(exp_linear, EXPONENT_LIMIT), (expm1_linear, EXPONENT_LIMIT), (log_odds, LOG_ODDS_LIMIT)],
)
def test_extensions_are_tangents(function, limit):
    """Value and slope are continuous at the limit, and the slope is constant beyond."""
    step = 1e-7 * abs(limit)
    x = torch.tensor([limit - step, limit, limit + step, limit + 5.0], dtype=torch.float64)
    x.requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope, slope[1].expand(4), rtol=1e-5)
    assert torch.allclose(y[:3], y[1].expand(3), rtol=1e-5)
    assert (y[3] - y[1]).item() == pytest.approx(5 * slope[1].item(), rel=1e-9)


def test_ddro_near_its_pole():
    """d_l = e^r/(2 - e^r) below e^r = 2 - 1e-3, 1999 from there on, in fp32 too: 2 - e^r = 0.01 gives 199,
    not 20."""
    loss = load_objective("ddro")
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        for gap, expected in ((0.01, 199.0), (2 * POLE_GAP, 999.0), (POLE_GAP / 2, 1999.0), (-100.0, 1999.0)):
            r_l = math.log(2 - gap)
            d_w, d_l = incentives(loss, pair_of((-5, -9 + r_l), (-5, -9), (2, 2), dtype=dtype))
            assert d_l.item() == pytest.approx(expected, rel=tolerance)
            assert d_w.item() == pytest.approx(1.0)


def test_orpo_near_probability_one():
    """Slope of log-odds at a = -0.01 is 1/(1 - e^-0.01) = 100.5; at a = 0 the tangent's, 1/(1 - e^-1e-5) =
    1e5 + 1/2."""
    for a, expected in ((-0.01, 1 / (1 - math.exp(-0.01))), (0.0, 100000.5), (1e-6, 100000.5)):
        x = torch.tensor([a], requires_grad=True)
        log_odds(x).sum().backward()
        assert x.grad.item() == pytest.approx(expected, rel=1e-3)


def test_lsif_and_ukl_beyond_their_exponent():
    """r_w = 40, r_l = 20 (2 r_l = 40): both slopes are e^30, and the values e^30 (1 + 10)."""
    pair = pair_of((40, 20), (0, 0), (1, 1))
    value, (d_w, d_l) = loss_and_incentives(load_objective("dil_lsif"), pair)
    assert value.item() == pytest.approx(-11 * math.exp(30) + 11 * math.exp(30) / 2)
    assert (d_w.item(), d_l.item()) == pytest.approx((math.exp(30), math.exp(30)))
    value, (d_w, d_l) = loss_and_incentives(load_objective("dil_ukl"), pair_of((0, 40), (0, 0), (1, 1)))
    assert value.item() == pytest.approx(11 * math.exp(30))
    assert (d_w.item(), d_l.item()) == pytest.approx((1.0, math.exp(30)))


def test_sigmoid_matches_torch():
    x = torch.linspace(-30, 15, 46, dtype=torch.float64)
    assert torch.allclose(sigmoid(x), torch.sigmoid(x), rtol=1e-12, atol=0)
