"""Where probability went: right values by hand, and the chunked pass against whole logits."""

import math

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import make_llama, make_pairs
from rcpo.evaluation.moves import NOBODY, PARTS, follow, moves
from rcpo.evaluation.moves_summary import summarise
from rcpo.evaluation.subject import find_subject
from rcpo.models.logprobs import HeadSizes
from rcpo.models.policy import Policy


def logits(*probabilities: tuple[float, ...]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_what_the_own_token_lost_is_what_others_gained() -> None:
    """Five tokens. Own token 0 falls from .5 to .1; of the .4 that it lost token 1, the other response's, got
    .1, token 2, a refusal, .2, token 3, the end, .15, and token 4 lost .05. Nats: log(.1 / .5)."""
    before, after = logits((0.5, 0.1, 0.1, 0.1, 0.2)), logits((0.1, 0.2, 0.3, 0.25, 0.15))
    found = moves(before, after, torch.tensor([0]), torch.tensor([1]), [2], [3])
    assert found.nats.tolist() == pytest.approx([math.log(0.2)])
    assert found.lost.tolist() == pytest.approx([0.4])
    assert found.own[0].tolist() == pytest.approx([0.5, 0.1])
    assert found.to[0].tolist() == pytest.approx([0.1, 0.2, 0.15, -0.05])
    assert found.change.tolist() == pytest.approx([-0.4, 0.1, 0.2, 0.15, -0.05])
    entropies = [
        -sum(p * math.log(p) for p in each)
        for each in ((0.5, 0.1, 0.1, 0.1, 0.2), (0.1, 0.2, 0.3, 0.25, 0.15))
    ]
    assert found.entropy[0].tolist() == pytest.approx(entropies)


def test_a_token_is_counted_once() -> None:
    """The other response's token is the end as well; elsewhere it is the own one, or there is none."""
    before = logits(*[(0.5, 0.2, 0.3)] * 3)
    after = logits(*[(0.2, 0.6, 0.2)] * 3)
    found = moves(before, after, torch.tensor([0, 0, 0]), torch.tensor([1, 0, NOBODY]), [], [1])
    expected = [[0.4, 0.0, 0.0, -0.1], [0.0, 0.0, 0.4, -0.1], [0.0, 0.0, 0.4, -0.1]]
    for row, right in zip(found.to.tolist(), expected, strict=True):
        assert row == pytest.approx(right)
    torch.testing.assert_close(found.to.sum(1), found.lost)


def test_theory_names_the_token_that_gains() -> None:
    """A step on h raises z of chosen 0 less z of rejected 1: its direction is W_0 - W_1, and a token's logit
    moves by <W_v, W_0 - W_1> (arXiv 2410.08847). W_0 - W_1 = (.1, -1): of tokens 2 = (3, -3) and 3 = (1, 1)
    the first moves by 3.3, more than the chosen one's .1, and takes the probability of all others."""
    weight = torch.tensor([[1.0, 0.0], [0.9, 1.0], [3.0, -3.0], [1.0, 1.0]], dtype=torch.float64)
    h = torch.tensor([[1.0, 0.9]], dtype=torch.float64, requires_grad=True)
    z = (h @ weight.T).log_softmax(-1)[0]
    (z[0] - z[1]).backward()
    assert h.grad is not None
    after = h.detach() + 0.5 * h.grad
    found = moves(h.detach() @ weight.T, after @ weight.T, torch.tensor([0]), torch.tensor([1]), [], [])
    assert found.change.argmax() == 2
    assert found.nats.item() < 0, "the preferred token itself became less likely"
    assert found.to[0].argmax() == 3


def test_chunks_and_batches_find_what_whole_logits_say() -> None:
    policies = [Policy(make_llama(seed=seed)) for seed in (0, 1)]
    pairs = make_pairs(5)
    ends = [pairs[0].chosen.input_ids[-1]]
    policies[0].head.sizes = HeadSizes(2, 0, False)
    sides = follow(*policies, pairs, 0, 2, [7], ends)
    for side, name in zip(sides, ("chosen", "rejected"), strict=True):
        for idx, pair in enumerate(pairs):
            own = getattr(pair, name)
            other = getattr(pair, "rejected" if name == "chosen" else "chosen")
            ids, num = torch.tensor([own.input_ids]), own.num_prompt
            with torch.no_grad():
                whole = [policy.model(ids).logits[0, num - 1 : -1] for policy in policies]
            length = len(own.input_ids) - num
            opposite = (other.input_ids[num:] + [NOBODY] * length)[:length]
            right = moves(*whole, ids[0, num:], torch.tensor(opposite), [7], ends)
            mine = side.pair == idx
            for field in ("nats", "lost", "own", "to", "entropy"):
                torch.testing.assert_close(
                    getattr(side, field)[mine], getattr(right, field), atol=1e-5, rtol=1e-4
                )
            assert side.position[mine].tolist() == list(range(length))
    change = torch.stack([sides[0].change, sides[1].change])
    assert change.sum(1).abs().max() < 1e-5
    last = int((sides[0].pair == 0).nonzero()[-1])
    assert PARTS[int(sides[0].part[last])] == "end"


def test_a_summary_adds_up() -> None:
    policies = [Policy(make_llama(seed=seed)) for seed in (0, 1)]
    chosen, _ = follow(*policies, make_pairs(6), 0, 4, [7], [3])
    found = summarise(chosen, find_subject("builtin:tiny").tokenizer(), 3)
    assert sum(each["share"] for each in found["to"].values()) == pytest.approx(1.0)
    assert sum(found["places"][name]["share"] for name in PARTS) == pytest.approx(1.0)
    assert sum(found["places"][name]["nats"] for name in PARTS) == pytest.approx(found["nats"])
    assert found["nats"] == pytest.approx(float(chosen.nats.sum()) / 6)
    changes = [each["change"] for each in found["gained"]]
    assert changes == sorted(changes, reverse=True)
    assert len(changes) == 3
