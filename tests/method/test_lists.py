"""Lists of responses: losses by hand and by finite differences, and a step of whole lists against plain
torch, whatever the split of a batch or the length of its longest list."""

import math
from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config
from helpers.lists import (
    PlainList,
    lire_loss,
    make_lists,
    norm_of,
    pl_dpo_loss,
    plain_step,
    rrhf_loss,
    slots_of,
)
from helpers.objective_cases import nls
from helpers.same_run import assert_equal_rows
from helpers.small_engine import SmallEngine, train_small
from helpers.tiny_models import make_llama, make_pairs
from rcpo.data.batch import collate
from rcpo.data.joint import collate_joint
from rcpo.data.lists import by_sign, lists_of, weighed_by_row
from rcpo.data.packer import pack
from rcpo.method.incentives import incentives, loss_and_incentives
from rcpo.method.metrics import list_row
from rcpo.models.policy import Policy
from rcpo.objectives import REGISTRY, PairLogProbs, load_objective
from rcpo.objectives.loss import Lists, Objective

LISTWISE = {"pl_dpo": pl_dpo_loss, "lire": lire_loss, "rrhf": rrhf_loss}
NAMES = [*LISTWISE, "pl_simpo"]
LENGTHS = (3, 2, 4, 4)


def listed_pairs(z: list[list[float]], ref: list[list[float]], scores: list[list[float]]) -> PairLogProbs:
    """Lists of four places at most, two slots each; |y| = 2, and 1 where nothing is."""
    lists = [PlainList([], list(each)) for each in scores]
    there = torch.tensor([[place < len(each.scores) for place in range(4)] for each in lists])
    order, known = torch.zeros(len(z), 4, dtype=torch.int64), torch.zeros(len(z), 4, dtype=torch.float64)
    sides = torch.zeros(3, len(z), 4, dtype=torch.float64)
    sides[2] = 1
    for idx, each in enumerate(scores):
        num = len(each)
        columns = [place if place < num - num // 2 else 2 + num - 1 - place for place in range(num)]
        order[idx, :num] = torch.tensor(columns)
        known[idx, :num] = torch.tensor(each)
        for field, values in enumerate((z[idx], ref[idx], [2.0] * num)):
            sides[field, idx, columns] = torch.tensor(values, dtype=torch.float64)
    both = [side for values in sides for side in (values[:, :2].flatten(), values[:, 2:].flatten())]
    return PairLogProbs(*both, lists=Lists(order, there, known))


PAIRS = listed_pairs(
    [[-4, -6, -5], [-3, -2, -4, -6], [-4, -6]],
    [[-5, -5, -5], [-3, -3, -3, -3], [-5, -5]],
    [[3, 2, 1], [2, 1, 1, 0], [1, 0]],
)
"""r = (1, -1, 0); (0, 1, -1, -3), of which the middle two are scored alike; (1, -1)."""


def of_lists(objective: Objective, pairs: PairLogProbs = PAIRS) -> list[float]:
    losses = objective(pairs)
    assert torch.equal(losses[::2], losses[1::2])  # both slots of a list have its loss
    return losses[::2].tolist()


def test_the_table_says_what_takes_lists() -> None:
    assert {name for name, entry in REGISTRY.items() if entry.listwise is True} == set(NAMES)
    assert load_objective("mix", terms=[{"name": "pl_dpo"}, {"name": "rrhf", "weight": 0.1}]).listwise
    assert not load_objective("mix", terms=[{"name": "pl_dpo"}, {"name": "sft"}]).listwise


def test_plackett_luce_by_hand() -> None:
    """beta = 1. First: log(1 + e^-2 + e^-1) + log(1 + e^1). Second: the best against three, each of the two
    that tie against the worst alone. Third: one comparison."""
    found = of_lists(load_objective("pl_dpo", beta=1.0))
    assert found == pytest.approx(
        [
            math.log(1 + math.exp(-2) + math.exp(-1)) + nls(-1),
            math.log(1 + math.exp(1) + math.exp(-1) + math.exp(-3)) + nls(4) + nls(2),
            nls(2),
        ]
    )


def test_the_others_by_hand() -> None:
    """z/|y| = (-2, -3, -2.5); (-1.5, -1, -2, -3); (-2, -3). rrhf: of the first 0.5, of the second 0.5."""
    x = [2 * (1 - 2) + 1, 2 * (0.5 - 1) + 1, 2 * (-0.5) + 1 + 2 * 0.5]  # beta (z_j - z_k)/|y| + gamma
    assert x == [-1, 0, 1]
    found = of_lists(load_objective("pl_simpo", beta=2.0, gamma=1.0))
    first = math.log(1 + math.exp(2 * -1 + 1) + math.exp(2 * -0.5 + 1)) + math.log(1 + math.exp(2 * 0.5 + 1))
    assert found[0] == pytest.approx(first)
    assert found[2] == pytest.approx(nls(1))  # simpo's
    shares = [math.exp(z) for z in (-4, -6, -5)]
    expected = -(3 * shares[0] + 2 * shares[1] + shares[2]) / sum(shares)
    assert of_lists(load_objective("lire"))[0] == pytest.approx(expected)
    halved = [share**0.5 for share in shares]
    expected = -(3 * halved[0] + 2 * halved[1] + halved[2]) / sum(halved) + 0.1 * 2
    assert of_lists(load_objective("lire", temperature=2.0, sft_weight=0.1))[0] == pytest.approx(expected)
    assert of_lists(load_objective("rrhf")) == pytest.approx([0.5 + 2, 0.5 + 1.5, 2])
    assert of_lists(load_objective("rrhf", rank_weight=10.0, sft_weight=0.0)) == pytest.approx([5, 5, 0])


@pytest.mark.parametrize(("listwise", "pairwise"), [("pl_dpo", "dpo"), ("pl_simpo", "simpo")])
def test_of_two_responses_it_is_the_pairs_loss_to_the_last_bit(listwise: str, pairwise: str) -> None:
    torch.manual_seed(0)
    z, ref = -10 * torch.rand(2, 50), -10 * torch.rand(2, 50)
    pairs = PairLogProbs(*z, *ref, *torch.randint(1, 9, (2, 50)).float())
    lists = lists_of(slots_of(make_lists([2] * 50)), 1)
    expected = loss_and_incentives(load_objective(pairwise), pairs)
    for given in (pairs, pairs._replace(lists=lists)):
        found = loss_and_incentives(load_objective(listwise), given)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.incentives.d_w, expected.incentives.d_w)
        assert torch.equal(found.incentives.d_l, expected.incentives.d_l)


@pytest.mark.parametrize("name", NAMES)
def test_incentives_are_those_of_the_mean_over_lists(name: str) -> None:
    """B dL/dz by central differences of the mean loss, one z at a time, fp64; 0 where nothing is."""
    objective, h = load_objective(name), 1e-5
    found = incentives(objective, PAIRS)
    num = len(PAIRS.z_w)
    for field, sign, column in zip(("z_w", "z_l"), (-1, 1), found, strict=True):
        for idx in range(num):
            moved = torch.zeros(num, dtype=torch.float64)
            moved[idx] = h
            up, down = (
                objective(PAIRS._replace(**{field: getattr(PAIRS, field) + step * moved})).mean().item()
                for step in (1, -1)
            )
            assert column[idx].item() == pytest.approx(sign * num * (up - down) / (2 * h), rel=1e-6, abs=1e-8)
    assert found.d_l[1] == found.d_w[5] == found.d_l[5] == 0


ALWAYS = {("pl_dpo", "on"), ("pl_dpo", "exact"), ("lire", "fixed"), ("rrhf", "off")}
STEPS = [
    pytest.param(name, kind, marks=() if (name, kind) in ALWAYS else pytest.mark.ci("rows of matrices"))
    for name in LISTWISE
    for kind in ("off", "on", "exact", "fixed")
]


@pytest.mark.parametrize(("name", "calibration"), STEPS)
def test_a_step_is_that_of_plain_torch_with_sides_by_sign(
    name: str, calibration: str, tmp_path: Path
) -> None:
    """SGD from weights apart from the reference's: the gradient is -alpha G_up + G_down / alpha. exact
    measures the norms of G_up and G_down, on those of the head's unweighted scores, means over lists."""
    lists, alpha = make_lists(LENGTHS, seed=4), 1.5 if calibration == "fixed" else 1.0
    words = {
        "off": (),
        "fixed": (f"calibration.alpha={alpha}", "metrics.geometry_every=1", "calibration.scope=full",
                  "calibration.estimator=weighted"),
    }.get(calibration, ("calibration.every=1", "calibration.warmup_steps=0"))  # fmt: skip
    case, words = (
        Case(name, calibration, "llama", "sgd"),
        (*words, "train.grad_clip=0", "train.pairs_per_step=4"),
    )
    config = make_config(tmp_path, tmp_path / "run", case, Layout(1, 4), *words)
    model, reference = make_llama(), make_llama(seed=1)
    plain = plain_step(model, reference, lists, LISTWISE[name])
    before = [each.detach().clone() for each in model.parameters()]
    frozen = SmallEngine(reference, config, 1)
    (row,) = train_small(model, slots_of(lists), config, 1, (4,), frozen, slots=2)
    assert row["train/loss"] == pytest.approx(plain.loss, rel=1e-5)
    assert row["incentive/chosen"] == pytest.approx(plain.mean_up, rel=1e-4)
    assert row["incentive/rejected"] == pytest.approx(plain.mean_down, rel=1e-4)
    assert row["calibration/alpha"] == alpha
    if calibration != "off":
        of_head = calibration == "on"
        norms = [norm_of([plain.head_up] if of_head else plain.up)]
        norms.append(norm_of([plain.head_down] if of_head else plain.down))
        assert [row["score/chosen_norm"], row["score/rejected_norm"]] == pytest.approx(norms, rel=1e-4)
    lr = config.optim.lr
    for old, new, up, down in zip(before, model.parameters(), plain.up, plain.down, strict=True):
        expected = old - lr * (-alpha * up + down / alpha)
        torch.testing.assert_close(new.detach(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "calibration",
    ["exact", *(pytest.param(each, marks=pytest.mark.ci("rows of matrices")) for each in ("on", "off"))],
)
def test_a_split_changes_nothing(calibration: str, tmp_path: Path) -> None:
    """Three steps of four lists, in one part, in two and one by one: every number, and weights to 1e-5."""
    every_step = ("calibration.every=1", "calibration.warmup_steps=0") if calibration != "off" else ()
    case = Case("pl_dpo", calibration, "llama-tied", "sgd")
    config = make_config(tmp_path, tmp_path / "run", case, Layout(1, 8), *every_step)
    made, slots = [], slots_of(make_lists(LENGTHS, seed=4))
    for split in ((4,), (2, 2), (1,) * 4):
        model = make_llama(tied=True)
        rows = train_small(
            model, slots, config, 3, split, SmallEngine(make_llama(seed=1), config, len(split)), 2
        )
        made.append((rows, dict(model.named_parameters())))
    (rows, weights), *others = made
    assert rows[0]["batch/chosen"] + rows[0]["batch/rejected"] == sum(LENGTHS)
    if calibration != "off":
        assert rows[-1]["calibration/alpha"] != 1
    for other_rows, other_weights in others:
        assert_equal_rows(rows, other_rows)
        for key, weight in weights.items():
            torch.testing.assert_close(other_weights[key], weight, atol=1e-5, rtol=0, msg=key)


def test_a_longer_list_elsewhere_changes_nothing_and_costs_no_row() -> None:
    """Three lists with slots as a list of six would need: as many rows and tokens, the same losses."""
    lists = make_lists((3, 2, 4), seed=4)
    short, long = slots_of(lists), slots_of([*lists, *make_lists((6,), seed=5)])[:9]
    assert (short.slots, long.slots, long.num_lists) == (2, 3, 3)
    policy, found = Policy(make_llama()), []
    for slots, pairs in ((2, short), (3, long)):
        batch = collate(pairs, 0)
        assert batch.input_ids.shape[0] == 9
        with torch.no_grad():
            z_w, z_l = policy(batch).chunk(2)
        len_w, len_l = batch.lengths.clamp(min=1).float().chunk(2)
        values = PairLogProbs(z_w, z_l, 0 * z_w, 0 * z_l, len_w, len_l, lists=lists_of(pairs, slots))
        found.append(load_objective("pl_dpo")(values)[::slots])
        for packing in (True, False):
            joint = collate_joint(pairs, 0, share_prefix=True, packing=packing)
            assert joint.input_ids.shape[0] == (1 if packing else 5)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("layout", ["rows", "shared", "packed"])
def test_lists_by_sign_have_the_same_z(layout: str) -> None:
    """Whatever is pulled up, none and all included: each response's z, by rank."""
    pairs = slots_of(make_lists(LENGTHS, seed=4))
    lists, policy = lists_of(pairs, 2), Policy(make_llama())
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        expected = lists.ranked(*policy(collate(pairs, 0)).chunk(2))
    for share in (0.0, 0.5, 1.0):
        found = by_sign(pairs, lists, torch.rand(16, generator=draw) < share)
        assert len(found.pairs) == 16
        batch = collate(found.pairs, 0)
        if layout != "rows":
            batch = collate_joint(found.pairs, 0, layout == "shared", layout == "packed")
        with torch.no_grad():
            z = found.lists.ranked(*policy(batch).chunk(2))
        torch.testing.assert_close((z * lists.there), (expected * lists.there), atol=1e-5, rtol=1e-5)
        num_up = sum(bool(pair.chosen.num_tokens) for pair in found.pairs)
        assert num_up == {0.0: 0, 1.0: sum(LENGTHS)}.get(share, num_up)


def test_held_out_lists_by_hand() -> None:
    """r = (3, 1, 2) and (-1, 0): chosen (3 - 1)/2, rejected (2 + 0)/2; of the first list 2 of 3 comparisons
    are right, of the second none."""
    pairs = slots_of(make_lists((3, 2)))
    lists, zeros = lists_of(pairs, 2), torch.zeros(4)
    row = list_row(torch.tensor([3.0, 1, -1, 9]), torch.tensor([2.0, 9, 0, 9]), zeros, zeros, lists)
    assert row["displacement/accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert (row["displacement/chosen"], row["displacement/rejected"], row["displacement/margin"]) == (1, 1, 0)
    assert (row["displacement/chosen_down"], row["displacement/both_down"]) == (0.5, 0)
    assert [row[f"displacement/rank_{place}"] for place in (1, 2, 3)] == [1, 0.5, 2]


def test_every_row_weighs_alike_in_all_pairs() -> None:
    """Rows of 1 and 3 pairs: weights 2 and 2/3, whose mean is 1."""
    weights = weighed_by_row(pack(make_pairs(4)), [1, 3]).arrays.weights
    assert weights.tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])
