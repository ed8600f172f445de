"""Single answers with a label: which losses take them, by hand and by autograd, and that a step does not
depend on how its answers are cut into micro-batches or laid out."""

import math
from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config
from helpers.same_run import assert_equal_rows
from helpers.small_engine import SmallEngine, train_small
from helpers.tiny_models import make_llama, make_pairs
from rcpo.config.schema import DataConfig
from rcpo.config.validate import section_of
from rcpo.data.batch import collate
from rcpo.data.joint import collate_joint
from rcpo.data.labels import drawn_to_flip
from rcpo.data.mismatched import Mismatch, MismatchedPairs
from rcpo.data.packer import pack
from rcpo.data.pairs import NO_SIDE, SideLogProbs, TokenizedPair, present_in_pairs, without_missing
from rcpo.method.incentives import incentives, loss_and_incentives
from rcpo.method.metrics import QUANTITIES, balance_row, displacement_row, means_of, pair_sums
from rcpo.models.policy import Policy
from rcpo.objectives import REGISTRY, PairLogProbs, load_objective
from rcpo.objectives.trial import takes_single_answers

TAKE_THEM = {
    "apo_zero", "bco", "ddro", "dil_bce", "dil_lsif", "dil_ukl", "kto", "nca", "sft", "sppo",
}  # fmt: skip
PARAMETERS = {"mix": {"terms": [{"name": "dpo"}]}}


def singles(num_pairs: int = 8, *, seed: int = 3) -> list[TokenizedPair]:
    """Chosen alone, rejected alone, rejected alone, both, and so on."""
    made = []
    for number, pair in enumerate(make_pairs(num_pairs, seed=seed)):
        kept = (True, False), (False, True), (False, True), (True, True)
        has_w, has_l = kept[number % 4]
        made.append(
            TokenizedPair(pair.chosen if has_w else NO_SIDE, pair.rejected if has_l else NO_SIDE, pair.row)
        )
    return made


def test_a_probe_finds_the_losses_that_are_sums_of_two_sides() -> None:
    found = {
        name for name in REGISTRY if takes_single_answers(load_objective(name, **PARAMETERS.get(name, {})))
    }
    assert found == TAKE_THEM
    both = [{"name": "kto", "weight": 2.0}, {"name": "sft", "weight": 0.1}]
    assert takes_single_answers(load_objective("mix", terms=both))
    assert not takes_single_answers(load_objective("mix", terms=[*both, {"name": "dpo"}]))


def pair_of(has_w: list[float], has_l: list[float]) -> PairLogProbs:
    """r_w = 2 and r_l = -1 where they are there; 0 and |y| = 1 where not."""
    w, v = torch.tensor(has_w, dtype=torch.float64), torch.tensor(has_l, dtype=torch.float64)
    return PairLogProbs(-3 * w, -4 * v, -5 * w, -3 * v, 1 + 3 * w, 1 + v, present=(w, v))


def test_kto_of_single_answers_by_hand() -> None:
    """beta = 0.1, z0 = 0. Chosen alone: 1 - sigmoid(0.2) = 0.450166, d_w = 0.1 s (1-s) = 0.0247517. Rejected
    alone: 1 - sigmoid(0.1) = 0.475021, d_l = 0.0249376. Both: their sum."""
    loss, (d_w, d_l) = loss_and_incentives(load_objective("kto", beta=0.1), pair_of([1, 0, 1], [0, 1, 1]))
    torch.testing.assert_close(loss, torch.tensor([0.450166, 0.475021, 0.925187]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(d_w, torch.tensor([0.0247517, 0, 0.0247517]).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(d_l, torch.tensor([0, 0.0249376, 0.0249376]).double(), atol=1e-7, rtol=0)


def test_bco_learns_its_shift_from_the_responses_that_are_there() -> None:
    """Columns r_w = 2, r_l = -1 and their mean 1/2: d after one step is their mean, 1/2."""
    objective = load_objective("bco", beta=0.1)
    columns = objective.statistic_columns(pair_of([1, 0, 1], [0, 1, 1]))
    assert columns.tolist() == [[2.0, -1.0, 0.5]]
    assert objective.advance((0.0, 0.0), [columns.mean().item()]) == (0.5, 1.0)


@pytest.mark.parametrize("name", sorted(TAKE_THEM))
def test_a_side_that_is_missing_pulls_nothing_and_the_other_as_in_its_pair(name: str) -> None:
    objective = load_objective(name)
    whole = incentives(objective, pair_of([1, 1], [1, 1]))
    apart = incentives(objective, pair_of([1, 0], [0, 1]))
    assert apart.d_w.tolist() == [whole.d_w[0].item(), 0.0]
    assert apart.d_l.tolist() == [0.0, whole.d_l[0].item()]


def test_unpaired_pairs_have_half_the_loss_of_the_pairs_a_row() -> None:
    """2 B rows in the place of B pairs: their mean loss is half, and the sum over both rows is the pair's."""
    objective = load_objective("nca")
    of_pair, of_rows = objective(pair_of([1], [1])), objective(pair_of([1, 0], [0, 1]))
    torch.testing.assert_close(of_rows.sum(), of_pair[0])


def test_means_count_only_what_is_there() -> None:
    """Chosen r of 2 twice, rejected r of -1 three times, two whole pairs of four, both with r_w > r_l."""
    pair = pair_of([1, 0, 1, 0], [0, 1, 1, 1])
    sums = pair_sums(torch.ones(4), pair, incentives(load_objective("kto", beta=0.1), pair)).tolist()
    means = means_of(sums, 4, 2, 3, 1)
    assert means["train/loss"] == 1
    assert set(means) == set(QUANTITIES)
    assert (means["displacement/chosen"], means["displacement/rejected"]) == (2, -1)
    assert (means["logps/chosen"], means["logps/rejected_per_token"]) == (-3, -2)
    assert (means["displacement/accuracy"], means["displacement/both_down"]) == (1, 0)
    assert means["incentive/chosen"] == pytest.approx(0.0247517, abs=1e-7)
    assert balance_row(4, 2, 3, 1) == {"batch/chosen": 2, "batch/rejected": 3}
    assert balance_row(4, 4, 4, 4) == {}
    of_rejected = means_of(sums, 4, 0, 3, 0)
    assert not {"displacement/chosen", "displacement/accuracy", "incentive/chosen"} & set(of_rejected)


def test_held_out_answers_are_compared_two_by_two() -> None:
    """Chosen r: 3 and 0. Rejected r: 1, 0, -2. Of six, 3 is above all three, 0 above one and even with one:
    (3 + 1.5) / 6."""
    pair = (
        TokenizedPair(make_pairs(1)[0].chosen, NO_SIDE, 0),
        TokenizedPair(NO_SIDE, make_pairs(1)[0].rejected, 0),
    )
    pairs = [pair[0], pair[0], pair[1], pair[1], pair[1]]
    now = torch.tensor([3.0, 0, 9, 9, 9]), torch.tensor([9.0, 9, 1, 0, -2])
    start = torch.zeros(5), torch.zeros(5)
    row = displacement_row(*now, *start, num_probed=3, present=present_in_pairs(pairs))
    assert row["displacement/accuracy"] == pytest.approx(4.5 / 6)
    assert (row["displacement/chosen"], row["displacement/chosen_down"]) == (1.5, 0)
    assert row["displacement/rejected"] == pytest.approx(-1 / 3)
    assert (row["probed/chosen"], row["probed/rejected"], row["unprobed/rejected"]) == (1.5, 1, -1)
    assert "displacement/both_down" not in row
    assert "unprobed/chosen" not in row
    kept = without_missing(SideLogProbs(*now), present_in_pairs(pairs))
    assert kept.z_w.isnan().tolist() == [False, False, True, True, True]
    lost = torch.tensor([torch.nan, 0, 9, 9, 9])
    row = displacement_row(*now, lost, start[1], present=present_in_pairs(pairs))
    assert math.isnan(row["displacement/chosen"])  # a number that was lost is not a response that is missing


@pytest.mark.parametrize("layout", ["rows", "packed", "shared", "shared and packed"])
def test_z_of_single_answers_is_that_of_their_pairs(layout: str) -> None:
    """And 0 where there is none; nobody computes rows for it."""
    policy, whole, alone = Policy(make_llama()), make_pairs(8, seed=3), singles()
    batch = collate(alone, 0)
    assert batch.input_ids.shape[0] == 10
    assert batch.present == (4, 6, 2)
    if layout != "rows":
        batch = collate_joint(alone, 0, "shared" in layout, "packed" in layout)
        assert batch.present == (4, 6, 2)
    with torch.no_grad():
        expected, z = policy(collate(whole, 0)), policy(batch)
    is_there = batch.lengths > 0
    torch.testing.assert_close(z[is_there], expected[is_there], atol=1e-5, rtol=1e-5)
    assert not z[~is_there].any()


def test_a_side_that_nobody_has_goes_through_the_model_as_padding() -> None:
    alone = collate([TokenizedPair(NO_SIDE, pair.rejected, 0) for pair in make_pairs(3)], 0)
    chosen = alone.side(chosen=True)
    assert chosen.input_ids.shape[0] == 1
    z = Policy(make_llama())(chosen)
    z.mean().backward()
    assert z.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["kto", "bco", "ddro"])
@pytest.mark.parametrize("calibration", ["exact", "on"])
def test_micro_batches_of_single_answers_change_nothing(name: str, calibration: str, tmp_path: Path) -> None:
    """Chosen answers alone, rejected ones alone, and pairs; a micro-batch of two has no chosen one."""
    made = []
    every_step = ("calibration.every=1", "calibration.warmup_steps=0")
    case = Case(name, calibration, "llama-tied", "sgd")
    config = make_config(tmp_path, tmp_path / "run", case, Layout(1, 8), *every_step)
    pairs = singles()
    pairs = [pairs[0], pairs[3], pairs[1], pairs[2], *pairs[4:]]
    for split in ((8,), (2,) * 4):
        model = make_llama(tied=True)
        rows = train_small(model, pairs, config, 3, split, SmallEngine(make_llama(), config, len(split)))
        made.append((rows, dict(model.named_parameters())))
    (rows, weights), (other_rows, other_weights) = made
    assert (rows[0]["batch/chosen"], rows[0]["batch/rejected"]) == (4, 6)
    assert "band/position" in rows[0]
    assert rows[-1]["calibration/alpha"] != 1
    assert_equal_rows(rows, other_rows)
    for key, weight in weights.items():
        torch.testing.assert_close(other_weights[key], weight, atol=1e-5, rtol=0, msg=key)


def test_a_mismatched_answer_keeps_its_label() -> None:
    """The prompt of a chosen answer with a rejected answer is a rejected one."""
    pairs = pack(singles(4))
    made = MismatchedPairs(pairs, [Mismatch(0, 1), Mismatch(1, 2), Mismatch(2, 3), Mismatch(3, 0)], 64)
    assert [(bool(one.chosen.num_tokens), bool(one.rejected.num_tokens)) for one in made] == [
        (False, True), (False, True), (True, True), (True, False),
    ]  # fmt: skip
    assert made[0].prompt_ids == pairs[0].prompt_ids
    assert made.widths() == [max(side.num_tokens for side in one.sides) for one in made]


def test_pairs_are_taken_apart_and_labels_exchanged() -> None:
    pairs = pack(make_pairs(3))
    apart = pairs.unpaired()
    assert [pair.row for pair in apart] == [0, 0, 1, 1, 2, 2]
    assert [pair.chosen for pair in apart[::2]] == [pair.chosen for pair in pairs]
    assert [pair.rejected for pair in apart[1::2]] == [pair.rejected for pair in pairs]
    assert all(pair.rejected == NO_SIDE for pair in apart[::2])
    assert apart.unpaired() == apart
    flipped = pairs.flipped([1])
    assert (flipped[1].chosen, flipped[1].rejected) == (pairs[1].rejected, pairs[1].chosen)
    assert flipped[0] == pairs[0]
    assert pairs.flipped([]) == pairs
    assert apart.flipped([0])[0] == TokenizedPair(NO_SIDE, pairs[0].chosen, 0)


def test_the_draw_of_label_noise() -> None:
    """As many as the share says, by the data's seed; a larger share has all of a smaller one's."""

    def drawn(flip: float, seed: int = 0) -> list[int]:
        return drawn_to_flip(40, section_of(DataConfig, {"source": "arithmetic", "flip": flip, "seed": seed}))

    assert drawn(0.0) == []
    assert drawn(1.0) == list(range(40))
    assert len(drawn(0.1)) == 4
    assert drawn(0.1) == drawn(0.1) != drawn(0.1, seed=1)
    assert set(drawn(0.1)) < set(drawn(0.3))
