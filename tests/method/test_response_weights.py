"""An exponent of KL-DRO for each response's weight (objective.sample_weight=dora_each): by hand, by autograd
on the losses alone however the batch is split, and how the weights travel with pairs and lists."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helpers.cases import Case, Layout, make_config
from helpers.small_engine import SmallEngine, train_small
from helpers.tiny_models import make_llama, make_pairs
from rcpo.data.lists import by_sign, lists_of, pairs_of_list
from rcpo.data.packer import pack
from rcpo.data.pairs import TokenizedPair, TokenizedSide
from rcpo.records.lists import read_list
from rcpo.records.weights import DoraSidesWeight, weighed
from rcpo.training.aggregate import spread_over


def test_an_exponent_for_each_response_is_the_hand_worked_number() -> None:
    """L = log 2, lambda 1. Weights 2 and 1: log((4 + 2)/2) = log 3 with the derivative (4 * 2 + 2 * 1) / 6;
    weights 1, 2, 3: log((2 + 4 + 8)/3), (2 + 8 + 24) / 14. Of one weight it is the weighted loss."""
    spread = torch.tensor([[4 / 3, 2 / 3, math.nan], [0.5, 1.0, 1.5], [1.0, math.nan, math.nan]])
    losses = torch.full((3,), math.log(2), dtype=torch.float64, requires_grad=True)
    spread_losses, weights = spread_over(spread.double(), torch.tensor([1.5, 2.0, 0.7]).double(), losses, 1.0)
    expected = torch.tensor([math.log(3), math.log(14 / 3), 0.7 * math.log(2)])
    torch.testing.assert_close(spread_losses.float(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights.float(), torch.tensor([10 / 6, 34 / 14, 0.7]), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(spread_losses.sum(), losses)
    torch.testing.assert_close(gradient, weights)


@pytest.mark.parametrize("dro_lambda", [1.0, 0.25])
def test_an_exponent_for_each_response_is_the_gradient_of_one_logarithm(
    dro_lambda: float, tmp_path: Path
) -> None:
    """lambda log(1/8 sum_{b,i} e^(w_bi L_b / lambda)) of four pairs, by autograd on the losses alone; in one
    part and in four. SGD at a rate of 1 shows the gradient."""
    pairs, each = make_pairs(4, seed=5), ((1.0, 3.0), (2.0, 0.5), (1.0, 1.0), (0.2, 0.4))
    weighed = [
        replace(pair, weight=sum(own) / 2, spread=tuple(2 * weight / sum(own) for weight in own))
        for pair, own in zip(pairs, each, strict=True)
    ]
    words = ("objective.aggregate=kl_dro", f"objective.dro_lambda={dro_lambda}", "optim.lr=1")
    config = make_config(
        tmp_path, tmp_path / "run", Case("dpo", "off", "llama", "sgd"), Layout(1, 2), *words,
        "objective.sample_weight=dora_each", "train.grad_clip=0",
    )  # fmt: skip
    found = []
    for split in ((4,), (1, 1, 1, 1)):
        model = make_llama()
        before = torch.cat([weight.detach().clone().flatten() for weight in model.parameters()])
        frozen = SmallEngine(make_llama(seed=1), config, 1)
        (row,) = train_small(model, weighed, config, 1, split, frozen)
        after = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        found.append((row["train/loss"], before - after))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-6, rtol=1e-5)

    model, frozen_model = make_llama(), make_llama(seed=1)
    losses = []
    for pair in pairs:
        r = [
            sum_of(model, side) - sum_of(frozen_model, side).detach() for side in (pair.chosen, pair.rejected)
        ]
        losses.append(-F.logsigmoid(0.1 * (r[0] - r[1])))
    exponents = torch.tensor(each) * torch.stack(losses)[:, None] / dro_lambda
    loss = dro_lambda * (exponents.flatten().logsumexp(0) - math.log(8))
    loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    assert found[0][0] == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(found[0][1], gradient, atol=1e-6, rtol=1e-4)


def sum_of(model: torch.nn.Module, side: TokenizedSide) -> torch.Tensor:
    """z of one response, by the model's own logits."""
    ids = torch.tensor(side.input_ids)
    logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return logps[side.num_prompt - 1 :].sum()


def test_weights_travel_with_their_pairs() -> None:
    """At a = a_i = 1/2 a response of probability p weighs 2p. Kept, taken, flipped and taken apart."""
    sides = [TokenizedSide([5, 6, 7 + number], 1) for number in range(4)]
    pairs = pack(
        [
            TokenizedPair(sides[0], sides[1], 0, 1.5, spread=(4 / 3, 2 / 3)),
            TokenizedPair(sides[2], sides[3], 1, 0.5, spread=(0.5, 1.5)),
        ]
    )
    assert [pair.spread for pair in pairs] == [(4 / 3, 2 / 3), (0.5, 1.5)]
    assert pairs.take([1])[0].spread == (0.5, 1.5)
    assert [pair.spread for pair in pairs.flipped([1])] == [(4 / 3, 2 / 3), (1.5, 0.5)]
    apart = pairs.flipped([1]).unpaired()
    own = [pair.weight * share for pair in apart for share in pair.spread or ()]
    assert own == pytest.approx([2.0, 1.0, 0.75, 0.25])
    assert [pair.spread for pair in pack([TokenizedPair(sides[0], sides[1], 0)])] == [None]


def test_weights_travel_with_lists() -> None:
    """Probabilities .2, .8 and .5 of responses scored 1, 3 and 2: sorted best first 1.6, 1 and .4, mean 1."""
    dora = DoraSidesWeight(0.5, 0.5, "each")
    row = ("p", [" a", " b", " c"], [1, 3, 2], None, 0, None, None, None, [0.2, 0.8, 0.5])
    record = read_list(*row, dora.weigh_list)
    sides = [TokenizedSide([5, 6, 7 + number], 1) for number in range(3)]
    slots = pairs_of_list(sides, record, "whole")
    assert [slot.weight for slot in slots] == pytest.approx([1.0, 1.0])
    assert [slot.spread for slot in slots] == [pytest.approx((1.6, 1.0, 0.4))] * 2
    laid = by_sign(slots, lists_of(slots, 2), torch.tensor([True, False, False, True]))
    assert [pair.spread for pair in laid.pairs] == [slots[0].spread] * 4
    (best_worst,) = pairs_of_list(sides, record, "best_worst")
    assert (best_worst.weight, best_worst.spread) == (pytest.approx(1.0), pytest.approx((1.6, 0.4)))
    both = pack([*slots, TokenizedPair(sides[0], sides[1], 1, 1.0, (1.0, 0.0), spread=(1.5, 0.5))])
    assert [pair.spread for pair in both] == [slots[0].spread] * 2 + [(1.5, 0.5)]

    values = {"probability_chosen": 0.9, "probability_rejected": "0.3"}
    pair = weighed(replace(record, scores=(), between=(), of_responses=None), dora, values)
    assert pair.weight == pytest.approx(1.2)
    assert pair.of_responses is not None
    assert pair.of_responses.spread((0, 1)) == pytest.approx((1.5, 0.5))
    assert DoraSidesWeight(0.5, 0.5, "mean").weigh_sides(values).spread((0, 1)) is None
