"""calibration=published against its recursion written down once more, on the embedded model; what a step that
is given up leaves, what a checkpoint keeps, and what is refused."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from helpers.plain_loop import summed
from helpers.plain_published import train_published
from helpers.selection import matrix
from helpers.small_engine import train_small
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.validate import validate
from rcpo.data.tokenize import TokenizedPair
from rcpo.engine.engine import build_optimizer
from rcpo.library.calibrator import Calibrator
from rcpo.method.incentives import Incentives
from rcpo.method.published import PublishedCalibration
from rcpo.method.scores import ScoreGeometry
from rcpo.method.statistics import StepStatistics
from rcpo.models.adapters import last_block_parameters
from rcpo.models.load import load_model
from rcpo.training.read_inputs import read_inputs

# The recursion by itself


def incentives(d_w: float, d_l: float) -> Incentives:
    return Incentives(torch.tensor([d_w, d_w]), torch.tensor([d_l, d_l]))


def geometry(log_r_star: float) -> ScoreGeometry:
    """|s_w| = 1, |s_l| = e^(log r*), cosine 1/2."""
    size = math.exp(log_r_star)
    return ScoreGeometry(1.0, size**2, 0.5 * size)


def test_by_hand() -> None:
    """beta 1/2. log r = log 4, log r* = 0: the first is the average, alpha = 1/2. Then log r = 0, log r* =
    log 4: averages log 2 and log 2, alpha = 1. A side without incentive changes nothing. Then log r = 0, log
    r* = 0: half of log 2 each."""
    calibrator = PublishedCalibration(0.5, 20.0)
    calibrator.begin()
    alphas = [
        calibrator.alpha_of(incentives(4, 1), geometry(0)),
        calibrator.alpha_of(incentives(1, 1), geometry(math.log(4))),
        calibrator.alpha_of(incentives(0, 1), geometry(math.log(4))),
        calibrator.alpha_of(incentives(1, 1), geometry(0)),
    ]
    assert alphas == pytest.approx([0.5, 1, 1, 1])
    assert calibrator.of_rank(2) == {
        "calibration/alpha": pytest.approx(3.5 / 4 / 2),
        "calibration/position_ema": pytest.approx(math.log(2) / 4),
        "calibration/center_ema": pytest.approx(math.log(2) / 4),
        "calibration/skipped": 1,
        "calibration/clamped": 0,
    }


def test_alpha_is_limited_and_counted() -> None:
    calibrator = PublishedCalibration(0.98, 2.0)
    assert calibrator.alpha_of(incentives(1, 1), geometry(10)) == pytest.approx(math.exp(2))
    assert calibrator.of_rank(1)["calibration/clamped"] == 1


def test_a_step_that_is_given_up_leaves_no_trace() -> None:
    """`begin` without `update` before it."""
    one, other = PublishedCalibration(0.9, 20.0), PublishedCalibration(0.9, 20.0)
    for calibrator in (one, other):
        calibrator.begin()
        calibrator.alpha_of(incentives(2, 1), geometry(0.3))
        calibrator.update(StepStatistics(1, 1, None))
    one.begin()
    one.alpha_of(incentives(9, 1), geometry(1.0))
    for calibrator in (one, other):
        calibrator.begin()
    values = incentives(1, 2), geometry(-0.2)
    assert one.alpha_of(*values) == other.alpha_of(*values)
    assert one.of_rank(1) == other.of_rank(1)
    assert one.state_dict() == other.state_dict()


def test_state_of_another_number_of_ranks_is_joined() -> None:
    """Two ranks' averages on one: their mean; what they counted, in all."""
    two = [
        {"position": 0.2, "center": 0.4, "num_updates": 6, "num_skipped": 1, "num_clamped": 0},
        {"position": 0.4, "center": -0.2, "num_updates": 7, "num_skipped": 2, "num_clamped": 3},
    ]
    calibrator = PublishedCalibration(0.5, 20.0)
    calibrator.load_state_dict({"ranks": two})
    calibrator.begin()
    assert calibrator.state_dict()["ranks"] == [
        {
            "position": pytest.approx(0.3),
            "center": pytest.approx(0.1),
            "num_updates": 7,
            "num_skipped": 3,
            "num_clamped": 3,
        }
    ]
    calibrator.load_state_dict({"ranks": two[:1]})
    assert calibrator.state_dict()["ranks"] == two[:1]


# On the embedded model

NUM_STEPS, PAIRS_PER_STEP = 3, 32
MEAN = "objective.log_probs=mean"


def config_of(*words: str) -> ResolvedConfig:
    tree = compose(
        [
            *words, "calibration=published", "tracking=none", "run_dir=never", "train.device=cpu",
            f"train.pairs_per_step={PAIRS_PER_STEP}", "optim.eps=1e-4", "optim.lr=1e-3",
        ]
    )  # fmt: skip
    assert tree is not None
    return resolve(validate(tree), None)


@cache
def pairs() -> list[TokenizedPair]:
    """Of one optimizer step."""
    return list(read_inputs(config_of()).train[:PAIRS_PER_STEP])


def split(num_micro_batches: int) -> tuple[int, ...]:
    return (PAIRS_PER_STEP // num_micro_batches,) * num_micro_batches


def fresh_model(config: ResolvedConfig) -> Any:
    torch.manual_seed(0)
    return load_model(config.model)


def cut(sizes: Sequence[int]) -> list[list[TokenizedPair]]:
    starts = [sum(sizes[:idx]) for idx in range(len(sizes))]
    return [pairs()[start : start + size] for start, size in zip(starts, sizes, strict=True)]


CASES = {
    "dpo, 1": ("dpo", 1, ()),
    "dpo, 4": ("dpo", 4, ()),
    "dpo, 32": ("dpo", 32, ()),
    "cpo, 4": ("cpo", 4, ()),
    "dil_bce, 32": ("dil_bce", 32, ("calibration.ema_beta=0.9",)),
    "dil_bce of adapters, 4": ("dil_bce", 4, ("model.lora.rank=3",)),
}
"""Objective, micro-batches a step, further words."""
ALWAYS = ("dpo, 4", "dil_bce of adapters, 4")


@pytest.mark.parametrize("name", matrix(CASES, ALWAYS.__contains__, "rows of matrices"))
def test_alphas_and_weights_are_the_recursions(name: str) -> None:
    """After every step the mean alpha and both averages to 1e-5, and after three of them the weights to
    1e-5."""
    objective, num_micro_batches, words = CASES[name]
    config = config_of(f"objective={objective}", MEAN, *words)
    model, plain = fresh_model(config), fresh_model(config)
    sizes = split(num_micro_batches)
    rows = train_small(model, pairs(), config, NUM_STEPS, sizes)
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    adapters = last_block_parameters if config.calibration.scope == "lora_last" else None
    run = train_published(
        plain, [[cut(sizes)]] * NUM_STEPS, objective, build_optimizer(config.optim, trained),
        config.train.grad_clip, config.calibration.ema_beta, adapters,
    )  # fmt: skip
    assert (adapters is None) == (config.model.lora.rank is None)
    for row, alphas, emas in zip(rows, run.alphas, run.emas, strict=True):
        assert row["calibration/alpha"] == pytest.approx(sum(alphas[0]) / len(alphas[0]), rel=1e-5)
        assert row["calibration/position_ema"] == pytest.approx(emas[0][0], abs=1e-5)
        assert row["calibration/center_ema"] == pytest.approx(emas[0][1], abs=1e-5)
        assert row["calibration/skipped"] == row["calibration/clamped"] == 0
    assert abs(rows[0]["calibration/alpha"] - 1) > 1e-3
    expected = dict(plain.named_parameters())
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[key], atol=1e-5, rtol=0, msg=key)


def test_the_split_of_the_batch_changes_the_training() -> None:
    """As it does in the published code, and in none of rcpo's own kinds."""
    config = config_of("objective=dpo", MEAN)
    found = {
        number: train_small(fresh_model(config), pairs(), config, 2, split(number))[-1]["calibration/alpha"]
        for number in (1, 4)
    }
    assert abs(found[1] - found[4]) > 1e-3


@pytest.mark.parametrize("words", [(), ("model.lora.rank=3",)], ids=["head", "lora_last"])
def test_the_whole_step_is_measured_beside(words: tuple[str, ...]) -> None:
    """metrics.geometry_every=2: scores and band of the global batch in steps 1 and 3, those that `off`
    measures in step 1, and no bit of the training changes."""
    config = config_of("objective=dpo", MEAN, *words)
    watched = config_of("objective=dpo", MEAN, "metrics.geometry_every=2", *words)
    one, other = fresh_model(config), fresh_model(config)
    rows = train_small(one, pairs(), config, 3, split(4))
    watched_rows = train_small(other, pairs(), watched, 3, split(4))
    assert [len({"score/cosine", "band/position"} & set(row)) for row in watched_rows] == [2, 0, 2]
    assert rows == [{key: row[key] for key in plain} for plain, row in zip(rows, watched_rows, strict=True)]
    for weight, same in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same)
    scope = f"calibration.scope={config.calibration.scope}"
    tree = compose(
        ["objective=dpo", MEAN, "calibration=off", scope, "metrics.geometry_every=1", "tracking=none",
         "run_dir=never", "train.device=cpu", f"train.pairs_per_step={PAIRS_PER_STEP}", *words]
    )  # fmt: skip
    assert tree is not None
    off = resolve(validate(tree), None)
    expected = train_small(fresh_model(off), pairs(), off, 1, split(1))[0]
    for key, value in expected.items():
        if key.startswith("score/"):
            assert watched_rows[0][key] == pytest.approx(value, rel=1e-4)


def test_a_loop_of_your_own_has_the_same_recursion() -> None:
    """`rcpo.Calibrator("published", ...)` on the same micro-batches."""
    config = config_of("objective=cpo", MEAN, "train.grad_clip=0")
    sizes, model, plain = split(4), fresh_model(config), fresh_model(config)
    calibrator = Calibrator("published", "cpo", log_probs="mean", head=model.get_output_embeddings())
    optimizer = build_optimizer(config.optim, list(model.parameters()))
    rows = []
    for _ in range(NUM_STEPS):
        for batch in cut(sizes):
            z = summed(model, batch)
            lengths = [
                torch.tensor([float(len(side.input_ids) - side.num_prompt) for side in sides])
                for sides in ([pair.chosen for pair in batch], [pair.rejected for pair in batch])
            ]
            (calibrator.surrogate(*z, None, None, *lengths) / len(sizes)).backward()
        rows.append(calibrator.update())
        optimizer.step()
        optimizer.zero_grad()
    run = train_published(
        plain, [[cut(sizes)]] * NUM_STEPS, "cpo", build_optimizer(config.optim, list(plain.parameters())),
        0.0, config.calibration.ema_beta,
    )  # fmt: skip
    for row, alphas in zip(rows, run.alphas, strict=True):
        assert row["calibration/alpha"] == pytest.approx(sum(alphas[0]) / len(alphas[0]), rel=1e-5)
    for weight, same in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, same, atol=1e-5, rtol=0)
    again = Calibrator("published", "cpo", log_probs="mean", head=model.get_output_embeddings())
    again.load_state_dict(calibrator.state_dict())
    assert again.state_dict() == calibrator.state_dict()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["calibration.estimator=weighted"],
            "calibration.estimator=weighted: is not of the published protocol",
        ),
        (
            ["calibration.scope=full"],
            "calibration.scope=full: is not of the published protocol; type calibratio",
        ),
        (
            ["calibration.scope=lora_last"],
            "calibration.scope=lora_last: there is no adapter to measure; type ",
        ),
        (
            ["model.lora.rank=4", "deepspeed.stage=3"],
            "deepspeed.stage=3: takes each backward pass right after",
        ),
        (["objective=ti_dpo"], "objective=ti_dpo: weighs tokens by what the forward pass finds, and "),
    ],
)
def test_what_is_refused_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(*words)
    assert str(caught.value).startswith(said)
    assert "; type " in str(caught.value)
    assert "\n" not in str(caught.value)
