"""Invariant 6 for every objective, without DeepSpeed: however a batch is cut into micro-batches, the step is
the same. `tests/trainings/test_splits_of_every_objective.py` has it with DeepSpeed and two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.cases import Case, Layout, make_config
from helpers.same_run import assert_equal_rows
from helpers.selection import matrix
from helpers.small_engine import SmallEngine, train_small
from helpers.tiny_models import make_llama, make_pairs
from rcpo.objectives import REGISTRY

NUM_STEPS = 3
SPLITS = ((8,), (2,) * 4)
EVERY_STEP = ("calibration.every=1", "calibration.warmup_steps=0")


def trained(name: str, folder: Path, *words: str) -> list[tuple[list[dict[str, float]], dict[str, Any]]]:
    """Rows and weights, for each split."""
    case = Case(name, "exact", "llama-tied", "sgd")
    config = make_config(folder, folder / "run", case, Layout(1, 8), *EVERY_STEP, *words)
    made = []
    for split in SPLITS:
        model = make_llama(tied=True)
        reference = SmallEngine(make_llama(), config, len(split))
        rows = train_small(model, make_pairs(8, seed=3), config, NUM_STEPS, split, reference)
        made.append((rows, dict(model.named_parameters())))
    return made


@pytest.mark.parametrize(
    "name", matrix(sorted(REGISTRY), sorted(REGISTRY)[::4].__contains__, "rows of matrices")
)
def test_micro_batches_change_nothing(name: str, tmp_path: Path) -> None:
    """With `exact`, after 3 steps: weights to 1e-5, every metric of every step to fp32 tolerance. The
    reference is another model: apo_down's d_w is zero at r = 0, its G_w rounding."""
    start = make_llama(tied=True).state_dict()
    (rows, weights), *others = trained(name, tmp_path)
    assert rows[0]["calibration/alpha"] == 1.0
    assert any(not torch.equal(weight, start[key]) for key, weight in weights.items())
    for other_rows, other_weights in others:
        assert_equal_rows(rows, other_rows)
        for key, weight in weights.items():
            torch.testing.assert_close(other_weights[key], weight, atol=1e-5, rtol=0, msg=key)


@pytest.mark.ci("rows of matrices")
def test_micro_batches_change_nothing_where_a_step_reads_its_own_lengths(tmp_path: Path) -> None:
    """acpo tau=batch: its target is of the whole batch in each of its parts, and another one than the first
    step's with tau=previous, which was told 8 tokens a pair."""
    words = ("objective.delta=0.1", "objective.risen=formula")
    (rows, weights), (other_rows, other_weights) = trained(
        "acpo", tmp_path / "own", "objective.tau=batch", *words
    )
    assert_equal_rows(rows, other_rows)
    for key, weight in weights.items():
        torch.testing.assert_close(other_weights[key], weight, atol=1e-5, rtol=0, msg=key)
    (before, _), _ = trained("acpo", tmp_path / "before", *words)
    assert abs(before[0]["train/loss"] - rows[0]["train/loss"]) > 1e-4
    assert "calibration/alpha" in rows[-1]
