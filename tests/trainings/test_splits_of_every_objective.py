"""Invariant 6 for every objective: with `exact`, two ranks in micro-batches at ZeRO 2 train as one batch
does."""

from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import train_all
from helpers.same_run import assert_equal_rows, final_weights, metrics
from helpers.selection import asked_for, matrix
from rcpo.objectives import REGISTRY
from rcpo.runs.folder import RunFolder

LAYOUTS = (Layout(1, 8, 0), Layout(2, 2, 2))
WORDS = ("calibration.every=1", "calibration.warmup_steps=0", "train.steps=3", "train.eval_every=0")

ALWAYS = ("acpo", "bco", "simpo")
"""With and without batch statistics; `tests/method/test_splits.py` has all objectives, without DeepSpeed."""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, Layout], RunFolder]:
    """Each objective in both layouts, by one launch of one rank and one of two."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    folder: Path = tmp_path_factory.mktemp("runs")
    made = {}
    for name in (params["name"] for params in asked_for(request)):
        for layout in LAYOUTS:
            case = Case(name, "exact", "llama-tied", "sgd")
            words = (*WORDS, f"reference.path={inputs / 'llama'}")
            made[name, layout] = make_run(
                make_config(inputs, folder / f"{name}-{layout}", case, layout, *words)
            )
    for layout in LAYOUTS:
        train_all([run for (_, own), run in made.items() if own == layout], layout.ranks, timeout_seconds=400)
    return made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", matrix(sorted(REGISTRY), ALWAYS.__contains__, "rows of matrices"))
def test_ranks_and_micro_batches_change_nothing(name: str, runs: dict[tuple[str, Layout], RunFolder]) -> None:
    """After 3 steps: weights to 1e-5, every metric of every step and of both evaluations to fp32 tolerance.
    The reference is another
    model than the start: apo_down's d_w is zero at r = 0, and the direction of its G_w would be rounding."""
    one, two = (runs[name, layout] for layout in LAYOUTS)
    assert_equal_rows(metrics(one), metrics(two))
    assert_equal_rows(one.rows(one.eval), two.rows(two.eval))
    assert ("loss" in one.rows(one.eval)[0]) == (name != "ti_dpo")
    for key, weight in final_weights(one).items():
        torch.testing.assert_close(final_weights(two)[key], weight, atol=1e-5, rtol=0, msg=key)
    assert metrics(one)[0]["calibration/alpha"] == 1.0
