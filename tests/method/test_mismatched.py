"""An objective's numbers of mismatched pairs, in steps without DeepSpeed: kto as published against the plain
loop, by derivatives, and however the batch is cut."""

import math
from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config
from helpers.plain_loop import Settings, mismatched, summed, train_plainly
from helpers.same_run import assert_equal_rows
from helpers.selection import matrix
from helpers.small_engine import SmallEngine, train_small
from helpers.tiny_models import make_neox, make_pairs
from rcpo.data.batch import collate
from rcpo.data.tokenize import TokenizedPair
from rcpo.method.calibrators import FixedCalibration
from rcpo.objectives import load_objective
from rcpo.training.aggregate import Mean
from rcpo.training.beforehand import with_mismatched
from rcpo.training.measurement import Measurement
from rcpo.training.micro_batch import MicroBatch
from rcpo.training.pricing import price
from rcpo.training.state import Method, TrainState
from rcpo.training.step import NonFiniteStepError, train_step

MISMATCHED = "objective.kl=mismatched"
PAIRS = make_pairs(4, seed=3)
KTO = load_objective("kto", kl="mismatched")
EVERY_STEP = ("calibration.every=1", "calibration.warmup_steps=0")


def engine_of(tmp_path: Path, seed: int = 0) -> SmallEngine:
    config = make_config(tmp_path, tmp_path / "run", Case("kto", "off", "neox", "sgd"), Layout(1, 4))
    return SmallEngine(make_neox(seed=seed), config, 1)


def scored(pairs: list[TokenizedPair], sizes: tuple[int, ...]) -> list[MicroBatch]:
    """Micro-batches with the z of another model as their reference."""
    made, start = [], 0
    for size in sizes:
        part = pairs[start : start + size]
        with torch.no_grad():
            ref = summed(make_neox(seed=2), part)
        made.append(MicroBatch(collate(part, 0), ref.z_w, ref.z_l, torch.ones(size)))
        start += size
    return made


def as_seen(tmp_path: Path, sizes: tuple[int, ...] = (4,)) -> tuple[Method, TrainState]:
    """The state as a step of the four pairs sees it."""
    method = Method(engine_of(tmp_path), KTO, Mean(), 4)  # type: ignore[arg-type]
    state = TrainState(0, FixedCalibration(), KTO.initial_state(6.0))
    return method, with_mismatched(method, state, scored(mismatched(PAIRS, 1024), sizes))


def test_reference_point_loss_and_incentives_of_four_pairs(tmp_path: Path) -> None:
    """z0 from full logits of the two models, one row after another: a fifth of a nat and more. The loss is
    that of the formula, and d its central differences with z0 held: fp64, h = 1e-5."""
    _, state = as_seen(tmp_path)
    model, reference = make_neox(), make_neox(seed=2)
    with torch.no_grad():
        rows = mismatched(PAIRS, 1024)
        r = [now - ref for now, ref in zip(summed(model, rows), summed(reference, rows), strict=True)]
        z, ref = summed(model, PAIRS), summed(reference, PAIRS)
    z0 = float(torch.cat(r).mean())
    assert z0 > 0.2
    assert state.objective_state == (pytest.approx(z0, rel=1e-4),)
    (micro_batch,) = scored(PAIRS, (4,))
    priced = price(KTO, state.objective_state, micro_batch, z.z_w, z.z_l)

    def loss(z_w: float, z_l: float, idx: int) -> float:
        r_w, r_l = z_w - float(ref.z_w[idx]), z_l - float(ref.z_l[idx])
        return 1 / (1 + math.exp(0.1 * (r_w - z0))) + 1 / (1 + math.exp(0.1 * (z0 - r_l)))

    h = 1e-5
    for idx in range(4):
        both = float(z.z_w[idx]), float(z.z_l[idx])
        assert float(priced.loss[idx]) == pytest.approx(loss(*both, idx), rel=1e-4)
        slope_w = (loss(both[0] + h, both[1], idx) - loss(both[0] - h, both[1], idx)) / (2 * h)
        slope_l = (loss(both[0], both[1] + h, idx) - loss(both[0], both[1] - h, idx)) / (2 * h)
        assert float(priced.incentives.d_w[idx]) == pytest.approx(-slope_w, rel=1e-4)
        assert float(priced.incentives.d_l[idx]) == pytest.approx(slope_l, rel=1e-4)


def test_the_reference_point_is_the_same_for_every_split(tmp_path: Path) -> None:
    _, whole = as_seen(tmp_path)
    for sizes in ((1, 1, 1, 1), (2, 2), (3, 1)):
        _, cut = as_seen(tmp_path, sizes)
        assert cut.objective_state == (pytest.approx(whole.objective_state[0], rel=1e-5),)


@pytest.mark.parametrize("calibration", matrix(["off", "on"], lambda name: name == "on", "rows of matrices"))
def test_training_is_the_plain_loops_however_the_batch_is_cut(calibration: str, tmp_path: Path) -> None:
    """Two steps against a reference of other weights, calibrated too: weights to 1e-5, every number, and z0
    above 0 in every step."""
    case = Case("kto", calibration, "neox", "sgd")
    words = (*EVERY_STEP, MISMATCHED) if calibration == "on" else (MISMATCHED,)
    config = make_config(tmp_path, tmp_path / "run", case, Layout(1, 4), "train.pairs_per_step=4", *words)
    pairs = PAIRS
    plain = train_plainly(
        make_neox(), pairs, [list(range(4))] * 2, Settings("kto", calibration, "sgd", case.lr, 1.0),
        reference=make_neox(seed=2),
    )  # fmt: skip
    assert min(plain.reference_points) > 0.1
    made = []
    for split in ((4,), (1,) * 4):
        model = make_neox()
        reference = SmallEngine(make_neox(seed=2), config, 1)
        made.append(train_small(model, pairs, config, 2, split, reference))
        for row, expected in zip(made[-1], plain.rows, strict=True):
            for key in set(expected) - {"train/grad_norm"}:
                assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=2e-5), key
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight, plain.weights[name], atol=1e-5, rtol=0, msg=name)
    assert_equal_rows(*made)
    assert (abs(made[0][-1]["calibration/alpha"] - 1) > 1e-3) == (calibration == "on")


def test_a_mismatched_pair_without_a_number_stops_the_step(tmp_path: Path) -> None:
    """Its z0 would be max(0, nan) = 0; nothing is updated, and the state stays as it was."""
    engine = engine_of(tmp_path)
    before = {name: weight.clone() for name, weight in engine.policy.named_parameters()}
    method = Method(engine, KTO, Mean(), 4)  # type: ignore[arg-type]
    state = TrainState(3, FixedCalibration(), (0.7,))
    (rows,) = scored(mismatched(PAIRS, 1024), (4,))
    rows.ref_l[2] = math.nan
    with pytest.raises(NonFiniteStepError):
        train_step(method, state, scored(PAIRS, (4,)), Measurement(), mismatched=[rows])
    assert (state.step, state.objective_state) == (3, (0.7,))
    assert all(torch.equal(weight, before[name]) for name, weight in engine.policy.named_parameters())
