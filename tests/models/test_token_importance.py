"""ti_dpo: tokens weighted by 1 - p. z, its gradient and the head's scores against plain autograd; whole
runs."""

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import make_llama, make_pairs
from rcpo.common.errors import UserError
from rcpo.data.batch import PairBatch, collate
from rcpo.data.joint import collate_joint
from rcpo.method.scores import HeadScores
from rcpo.models.logprobs import importance_weighted
from rcpo.models.policy import Policy
from rcpo.objectives import load_objective

PAIRS = make_pairs(4, seed=6)


def with_reference(batch: PairBatch) -> PairBatch:
    """The batch with token log-probs of another model."""
    with torch.no_grad():
        return batch._replace(ref_token_logps=Policy(make_llama(seed=1))(batch, tokens=True))


def weighted_by_hand(policy: Policy, batch: PairBatch) -> Tensor:
    """sum ref + sum omega (logp - ref), side by side from full logits, omega detached."""
    logits = policy.model(input_ids=batch.input_ids).logits.flatten(0, 1)
    logps = logits.log_softmax(-1)[batch.token_positions, batch.targets]
    assert batch.ref_token_logps is not None
    z = []
    for logp, ref in zip(
        logps.split(batch.lengths.tolist()), batch.ref_token_logps.split(batch.lengths.tolist()), strict=True
    ):
        importance = 1 - logp.detach().exp() + 1e-6
        omega = importance * len(logp) / importance.sum()
        z.append(ref.sum() + (omega * (logp - ref)).sum())
    return torch.stack(z)


def test_weights_of_two_tokens() -> None:
    """p = .5 and .9: importances .5 and .1, mean .3, weights 5/3 and 1/3. Log-ratios log(.5/.25) and
    log(.9/.45), both log 2: r = (5/3 + 1/3) log 2."""
    batch = PairBatch(
        torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1, 3]), torch.zeros(3, dtype=torch.int64),
        torch.tensor([2, 1]), 2,
    )  # fmt: skip
    logps, refs = torch.tensor([0.5, 0.9, 0.2]).log(), torch.tensor([0.25, 0.45, 0.2]).log()
    z, omega = importance_weighted(logps, refs, batch)
    assert omega.tolist() == pytest.approx([5 / 3, 1 / 3, 1], rel=1e-4)
    r = z - torch.stack([refs[:2].sum(), refs[2]])
    assert r.tolist() == pytest.approx([2 * torch.tensor(2.0).log().item(), 0.0], abs=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_z_and_gradient_match_autograd_on_the_formula(shared: bool) -> None:
    policy = Policy(make_llama())
    batch = with_reference(collate(PAIRS, 0))
    own = with_reference(collate_joint(PAIRS, 0, True, True)) if shared else batch
    weights = torch.randn(8, generator=torch.Generator().manual_seed(2))
    expected_z, z = weighted_by_hand(policy, batch), policy(own)
    torch.testing.assert_close(z, expected_z, atol=2e-5, rtol=1e-5)
    parameters = list(policy.parameters())
    expected = torch.autograd.grad((weights * expected_z).sum(), parameters)
    for gradient, one in zip(torch.autograd.grad((weights * z).sum(), parameters), expected, strict=True):
        torch.testing.assert_close(gradient, one, atol=2e-4, rtol=1e-4)


def test_sides_apart_are_the_sides_together() -> None:
    policy, batch = Policy(make_llama()), with_reference(collate(PAIRS, 0))
    apart = torch.cat([policy(batch.side(chosen=True)), policy(batch.side(chosen=False))])
    torch.testing.assert_close(apart, policy(batch), atol=1e-5, rtol=1e-5)


def test_head_scores_are_those_of_the_weighted_z() -> None:
    """Scope head, estimator mean: |s_w|^2, |s_l|^2 and the product from autograd on each side's sum of z."""
    policy, batch = Policy(make_llama()), with_reference(collate(PAIRS, 0))
    sides = [policy(batch.side(chosen=chosen)).sum() for chosen in (True, False)]
    s_w, s_l = (torch.autograd.grad(side, policy.head.weight)[0].double() for side in sides)
    policy.head.scores = HeadScores(37, 16, False, torch.device("cpu"))
    (torch.randn(8, generator=torch.Generator().manual_seed(2)) * policy(batch)).sum().backward()
    found = policy.head.scores.sides(1.0, 1.0).partial_products()
    expected = torch.stack([(s_w * s_w).sum(), (s_l * s_l).sum(), (s_w * s_l).sum()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_it_is_no_term_of_a_mix() -> None:
    with pytest.raises(UserError, match=r"weighs the tokens of z, which the other terms would read too"):
        load_objective("mix", terms=[{"name": "ti_dpo"}, {"name": "sft"}])
    assert load_objective("ti_dpo").weighs_tokens
    assert not load_objective("dpo").weighs_tokens
