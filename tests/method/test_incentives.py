"""Incentives against central differences and against the gradient of a real loss, for every objective."""

import math

import pytest
import torch

from helpers.objective_cases import COMPARE_RANKS, PAIR_A, PAIR_B, off_kinks, s
from rcpo.method.incentives import incentives, loss_and_incentives
from rcpo.objectives import REGISTRY, PairLogProbs, load_objective

NAMES = sorted(REGISTRY)

# Pairs A and B of objective_cases.py, then r = (-2, -1) and r = (3, 2), z/|y| from -3 to -0.1. None lies at a
# kink, and none where acpo's k depends on z: k is held constant in the gradient, not in a difference
# quotient.
PAIRS = PairLogProbs(
    z_w=torch.tensor([-4.0, -9.0, -9.0, -0.2], dtype=torch.float64),
    z_l=torch.tensor([-6.0, -8.0, -8.0, -0.5], dtype=torch.float64),
    ref_w=torch.tensor([-5.0, -7.0, -7.0, -3.2], dtype=torch.float64),
    ref_l=torch.tensor([-5.0, -9.0, -7.0, -2.5], dtype=torch.float64),
    len_w=torch.tensor([2.0, 3.0, 3.0, 2.0], dtype=torch.float64),
    len_l=torch.tensor([3.0, 4.0, 4.0, 5.0], dtype=torch.float64),
)


@pytest.mark.parametrize("name", sorted(set(NAMES) - COMPARE_RANKS))
def test_incentives_match_central_differences(name):
    """d_w = -(L(z_w + h) - L(z_w - h))/2h and d_l = +(L(z_l + h) - L(z_l - h))/2h, fp64, h = 1e-5."""
    loss, h, pairs = load_objective(name), 1e-5, off_kinks(name, PAIRS)
    d_w, d_l = incentives(loss, pairs)
    up_w, down_w = loss(pairs._replace(z_w=pairs.z_w + h)), loss(pairs._replace(z_w=pairs.z_w - h))
    up_l, down_l = loss(pairs._replace(z_l=pairs.z_l + h)), loss(pairs._replace(z_l=pairs.z_l - h))
    scale = max(1e-3, d_w.abs().max().item(), d_l.abs().max().item())
    assert torch.allclose(d_w, -(up_w - down_w) / (2 * h), rtol=1e-6, atol=1e-6 * scale)
    assert torch.allclose(d_l, (up_l - down_l) / (2 * h), rtol=1e-6, atol=1e-6 * scale)


class TinyModel:
    """log-probs of 4 pairs under softmax(tanh(prompt @ theta)) with |y| = 2 and 3 tokens of a vocabulary of
    7."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.theta = torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_()
        self.prompts = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        self.chosen = torch.randint(7, (4, 2), generator=generator)
        self.rejected = torch.randint(7, (4, 3), generator=generator)

    def pair(self) -> PairLogProbs:
        token_logps = torch.log_softmax(2 * torch.tanh(self.prompts @ self.theta), dim=1)
        z_w, z_l = token_logps.gather(1, self.chosen).sum(1), token_logps.gather(1, self.rejected).sum(1)
        offset = torch.tensor([0.9, -0.4, 0.3, -1.1], dtype=torch.float64)
        len_w, len_l = torch.full_like(z_w, 2.0), torch.full_like(z_l, 3.0)
        return PairLogProbs(z_w, z_l, z_w.detach() - offset, z_l.detach() + 0.5 * offset, len_w, len_l)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_sum_of_its_two_halves(name):
    """grad_theta mean L = mean(-d_w grad z_w + d_l grad z_l), each pair's scores by a backward of its own, to
    1e-10."""
    model, loss = TinyModel(), load_objective(name)
    pair = model.pair()
    (whole,) = torch.autograd.grad(loss(pair).mean(), model.theta, retain_graph=True)
    d_w, d_l = incentives(loss, pair)
    halves = torch.zeros_like(whole)
    for idx in range(4):
        (s_w,) = torch.autograd.grad(pair.z_w[idx], model.theta, retain_graph=True)
        (s_l,) = torch.autograd.grad(pair.z_l[idx], model.theta, retain_graph=True)
        halves += (-d_w[idx] * s_w + d_l[idx] * s_l) / 4
    assert whole.norm() > 1e-4
    assert torch.allclose(whole, halves, rtol=1e-10, atol=1e-10 * whole.norm().item())


@pytest.mark.parametrize("name", sorted(set(NAMES) - COMPARE_RANKS))
def test_pairs_do_not_interact(name):
    """Given the state, a pair's loss and incentives are the same alone and in a batch: splits change
    nothing."""
    loss = load_objective(name)
    pairs = PAIRS._replace(state=loss.initial_state(6.0))
    whole = loss_and_incentives(loss, pairs)
    for idx in range(4):
        one = PairLogProbs(*(field[idx : idx + 1] for field in PAIRS[:6]), pairs.state)
        alone = loss_and_incentives(loss, one)
        assert torch.allclose(alone.loss, whole.loss[idx], rtol=1e-12)
        for single, batch in zip(alone.incentives, whole.incentives, strict=True):
            assert torch.allclose(single, batch[idx], rtol=1e-12)


def test_hand_worked_incentives():
    """Pair A: mt = 2, |y| = (2, 3), r = (1, -1).

    dpo: d_w = d_l = 0.1 s(-0.2). simpo (logit -1): 2 s(1)/|y|, so 2 s(1)/2 and 2 s(1)/3. sft: 1/2 and 0.
    dil_bce: s(-1) and s(-1). apo_down, pair B: d_w = -0.1 s'(-0.2) + 0.1 s'(0.3), d_l = 0.1 s'(0.3).
    """
    expected = {
        "dpo": (0.1 * s(-0.2), 0.1 * s(-0.2)),
        "simpo": (s(1.0), 2 * s(1.0) / 3),
        "sft": (0.5, 0.0),
        "dil_bce": (s(-1.0), s(-1.0)),
    }
    for name, values in expected.items():
        d_w, d_l = incentives(load_objective(name), PAIR_A)
        assert (d_w.item(), d_l.item()) == pytest.approx(values)
    d_w, d_l = incentives(load_objective("apo_down"), PAIR_B)
    slope = 0.1 * s(0.3) * s(-0.3)
    assert (d_w.item(), d_l.item()) == pytest.approx((slope - 0.1 * s(0.2) * s(-0.2), slope))


def test_incentives_leave_no_graph_and_need_no_grad_mode():
    """Results are detached, the caller's tensors get no gradient, and it works under torch.no_grad()."""
    z_w = PAIR_A.z_w.clone().requires_grad_()
    with torch.no_grad():
        loss, (d_w, d_l) = loss_and_incentives(load_objective("dpo"), PAIR_A._replace(z_w=z_w))
    assert not any(tensor.requires_grad for tensor in (loss, d_w, d_l))
    assert z_w.grad is None
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.2)))
