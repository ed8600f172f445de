"""objective.log_probs=mean: what every objective reads, what its incentives and scores are, and that a split
of the batch changes nothing."""

from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config
from helpers.objective_cases import COMPARE_RANKS, LOG2, PAIR_A, PAIR_B, nls, off_kinks, s
from helpers.plain_loop import Sides, full_geometry, head_geometry, summed
from helpers.same_run import assert_equal_rows
from helpers.small_engine import train_small
from helpers.tiny_models import make_llama, make_pairs
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.validate import validate
from rcpo.data.batch import collate
from rcpo.library.calibrator import Calibrator
from rcpo.method.incentives import incentives
from rcpo.objectives import REGISTRY, Objective, PairLogProbs, load_objective, objective_of
from rcpo.training.micro_batch import MicroBatch
from rcpo.training.pricing import price

NAMES = sorted(set(REGISTRY) - COMPARE_RANKS)
PAIRS = PairLogProbs(
    z_w=torch.tensor([-4.0, -9.0, -9.0, -0.8], dtype=torch.float64),
    z_l=torch.tensor([-6.0, -8.0, -8.0, -0.5], dtype=torch.float64),
    ref_w=torch.tensor([-5.0, -7.0, -7.0, -3.2], dtype=torch.float64),
    ref_l=torch.tensor([-5.0, -9.0, -7.0, -2.5], dtype=torch.float64),
    len_w=torch.tensor([2.0, 3.0, 3.0, 2.0], dtype=torch.float64),
    len_l=torch.tensor([3.0, 4.0, 4.0, 5.0], dtype=torch.float64),
)
"""No pair at a kink, of averaged log-probs either."""


def averaging(name: str, **params: object) -> Objective:
    return objective_of({"name": name, "log_probs": "mean", **params})


# Values


@pytest.mark.parametrize("name", ["sft", "simpo", "alpha_po", "orpo", "dpo_norm", "ipo"])
def test_what_divides_by_the_length_divides_once(name: str) -> None:
    """Losses of means alone are the same."""
    for pair in (PAIR_A, PAIR_B):
        assert averaging(name)(pair).item() == pytest.approx(load_objective(name)(pair).item(), rel=1e-12)


def test_hand_worked_values() -> None:
    """Pair A: r/|y| = 1/2, -1/3; z/|y| = -2, -2; lengths 2, 3. Pair B: z/|y| = -3, -2; r/|y| = -2/3, 1/4.

    r_dpo keeps its difference of lengths, 2 - 3 tokens. acpo's target is that of lengths 1 and 1.
    """

    def of(name: str, pair: PairLogProbs, **params: object) -> float:
        return averaging(name, **params)(pair).item()

    assert of("dpo", PAIR_A, beta=2) == pytest.approx(nls(2 * 5 / 6))
    assert of("r_dpo", PAIR_A) == pytest.approx(nls(0.1 * 5 / 6 - 0.05))
    assert of("cpo", PAIR_A) == pytest.approx(LOG2 + 2)
    assert of("cpo", PAIR_B) == pytest.approx(nls(-0.1) + 3)
    assert of("slic", PAIR_B) == pytest.approx(2 + 0.3)
    assert of("ipo", PAIR_A, length_normalized=False) == pytest.approx((5 / 6 - 5) ** 2)
    assert of("rpo", PAIR_A) == pytest.approx(2 + nls(0.1 * 5 / 6))
    assert of("dil_bce", PAIR_A) == pytest.approx(nls(1 / 2) + nls(1 / 3))
    assert of("kto", PAIR_A) == pytest.approx(s(-0.05) + s(-0.1 / 3))
    assert of("mix", PAIR_A) == pytest.approx(nls(0.1 * 5 / 6) + 0.2 * 2)
    # r_l < 0, beta r_w = 0.05 > tau = 0.02: no push, as k = 0.
    assert of("acpo", PAIR_A) == pytest.approx(nls(0.05))


def test_batch_statistics_are_of_means() -> None:
    """Pair A: (1/2 - 1/3)/2; acpo's lengths are 1 and 1, at the first step too."""
    assert averaging("kto").statistic_columns(PAIR_A).item() == pytest.approx(1 / 12)
    assert averaging("acpo").statistic_columns(PAIR_A).item() == 2.0
    assert averaging("acpo").initial_state(5.0) == (2.0,)


# Derivatives


def test_dpo_of_means_is_dpo_norm() -> None:
    """Loss, incentives by z, and of one training step every weight."""
    for pair in (PAIR_A, PAIR_B, PAIRS):
        mean, norm = averaging("dpo", beta=2.0), load_objective("dpo_norm", beta=2.0)
        assert torch.allclose(mean(pair), norm(pair), rtol=1e-12)
        for one, other in zip(incentives(mean, pair), incentives(norm, pair), strict=True):
            assert torch.allclose(one, other, rtol=1e-12)


def priced(objective: Objective, pairs: PairLogProbs, state: tuple[float, ...]):
    """`price` at these log-probs; of the batch it reads the lengths alone."""
    batch = collate(make_pairs(len(pairs.z_w), seed=0), 0)
    batch = batch._replace(lengths=torch.cat([pairs.len_w, pairs.len_l]).long())
    weight = torch.ones_like(pairs.z_w)
    return price(objective, state, MicroBatch(batch, pairs.ref_w, pairs.ref_l, weight), pairs.z_w, pairs.z_l)


@pytest.mark.parametrize("name", NAMES)
def test_incentives_are_by_the_mean_and_pulls_by_the_sum(name: str) -> None:
    """Central differences, fp64, h = 1e-5: of z/|y| moved by h, which is z moved by |y| h, and of z moved by
    h."""
    objective, h, moved = averaging(name), 1e-5, off_kinks(name, PAIRS)
    state = objective.initial_state(6.0)
    found = priced(objective, moved, state)
    assert torch.equal(found.pair.z_w, moved.z_w)
    scale = max(1e-3, *(float(d.abs().max()) for d in found.incentives))

    def slope(field: str, by: torch.Tensor) -> torch.Tensor:
        pairs, z = moved._replace(state=state), getattr(moved, field)
        up, down = (objective(pairs._replace(**{field: z + sign * by})) for sign in (1, -1))
        return (up - down) / (2 * h)

    one = torch.full_like(PAIRS.z_w, h)
    for field, sign, length, by_mean, by_sum in (
        ("z_w", -1, PAIRS.len_w, found.incentives.d_w, found.pulls.d_w),
        ("z_l", 1, PAIRS.len_l, found.incentives.d_l, found.pulls.d_l),
    ):
        tolerance = {"rtol": 1e-5, "atol": 1e-6 * scale}
        assert torch.allclose(by_mean, sign * slope(field, h * length), **tolerance)
        assert torch.allclose(by_sum, sign * slope(field, one), **tolerance)


# Trainings

MEAN = "objective.log_probs=mean"
EVERY_STEP = ("calibration.every=1", "calibration.warmup_steps=0")


def config_of(case: Case, tmp_path: Path, *words: str):
    return make_config(tmp_path, tmp_path / "run", case, Layout(1, 8), *words)


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ("on", EVERY_STEP),
        ("on", ("calibration.scope=full", *EVERY_STEP)),
        ("exact", EVERY_STEP),
        ("off", ("metrics.geometry_every=1",)),
        ("off", ("objective.aggregate=kl_dro", "objective.dro_lambda=0.1")),
    ],
)
def test_micro_batches_change_nothing(calibration: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """Weights to 1e-5 and every number after three steps of 8 pairs, in one part and in four."""
    config = config_of(Case("dpo", calibration, "llama-tied", "sgd"), tmp_path, MEAN, *words)
    made = []
    for split in ((8,), (2,) * 4):
        model = make_llama(tied=True)
        rows = train_small(model, make_pairs(8, seed=3), config, 3, split)
        made.append((rows, dict(model.named_parameters())))
    (rows, weights), (other_rows, other_weights) = made
    assert_equal_rows(rows, other_rows)
    for key, weight in weights.items():
        torch.testing.assert_close(other_weights[key], weight, atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("scope", ["head", "full"])
@pytest.mark.parametrize("estimator", ["mean", "weighted"])
def test_scores_are_those_of_the_means(scope: str, estimator: str, tmp_path: Path) -> None:
    """Step 1 against autograd in the plain loop: mean: gradient of the mean of z/|y|; weighted: of d z/|y|,
    the loss's two halves. At r = 0 d = beta/2 = 1 on both sides."""
    words = (f"calibration.scope={scope}", f"calibration.estimator={estimator}", "objective.beta=2")
    config = config_of(Case("dpo", "on", "llama", "sgd"), tmp_path, MEAN, *EVERY_STEP, *words)
    model, pairs = make_llama(), make_pairs(8, seed=3)
    len_w, len_l = (
        torch.tensor([len(side.input_ids) - side.num_prompt for side in sides], dtype=torch.float32)
        for sides in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    )
    measure = head_geometry if scope == "head" else full_geometry
    expected = measure(model, pairs, Sides(1 / len_w, 1 / len_l))
    row = train_small(model, pairs, config, 1, (4, 4))[0]
    for name, value in expected._asdict().items():
        assert row[f"score/{name}"] == pytest.approx(value, rel=1e-4)
    assert row["incentive/chosen"] == row["incentive/rejected"] == pytest.approx(1.0)  # beta / 2


def test_a_step_is_that_of_the_losss_own_gradient(tmp_path: Path) -> None:
    """One step of plain descent, off, against autograd through the whole objective; and logps stay sums."""
    config = config_of(Case("cpo", "off", "llama", "sgd"), tmp_path, MEAN, "train.grad_clip=0")
    pairs, model, plain = make_pairs(6, seed=3), make_llama(), make_llama()
    (row,) = train_small(model, pairs, config, 1, (3, 3))
    z = summed(plain, pairs)
    lengths = [
        torch.tensor([float(len(side.input_ids) - side.num_prompt) for side in sides])
        for sides in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    ]
    mean_w, mean_l = z.z_w / lengths[0], z.z_l / lengths[1]
    loss = (-torch.nn.functional.logsigmoid(0.1 * (mean_w - mean_l)) - mean_w).mean()
    loss.backward()
    assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["logps/chosen"] == pytest.approx(z.z_w.mean().item(), rel=1e-5)
    trained = dict(model.named_parameters())
    for name, weight in plain.named_parameters():
        assert weight.grad is not None
        expected = weight.detach() - config.optim.lr * weight.grad
        torch.testing.assert_close(trained[name].detach(), expected, atol=1e-6, rtol=1e-5, msg=name)


def test_a_loop_of_your_own_averages_too() -> None:
    """`rcpo.Calibrator("off", "dpo", log_probs="mean")`: the surrogate's value and gradient are dpo_norm's at
    that beta."""
    found = []
    for calibrator in (
        Calibrator("off", "dpo", log_probs="mean"),
        Calibrator("off", load_objective("dpo_norm", beta=0.1)),
    ):
        z_w, z_l = PAIRS.z_w.clone().requires_grad_(), PAIRS.z_l.clone().requires_grad_()
        value = calibrator.surrogate(z_w, z_l, *PAIRS[2:6])
        value.backward()
        row = calibrator.update()
        found.append((value.detach(), z_w.grad, z_l.grad, torch.tensor(row["displacement/chosen"])))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
    with pytest.raises(UserError, match=r"^log_probs=mean: is for an objective given by name; write "):
        Calibrator("off", load_objective("dpo"), log_probs="mean")


# The key


def test_another_word_is_one_line() -> None:
    tree = compose(["objective.log_probs=average"])
    assert tree is not None
    with pytest.raises(UserError) as caught:
        validate(tree)
    assert str(caught.value) == (
        "objective.log_probs=average: must be sum or mean; type objective.log_probs=sum"
    )
