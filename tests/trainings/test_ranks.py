"""Invariant 6: however a global batch is split into micro-batches and ranks, the training is the same, and it
is the plain loop's."""

from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import train_all
from helpers.same_run import assert_equal_rows, assert_equals_plain, final_weights, metrics, plain_run
from helpers.selection import asked_for, matrix
from rcpo.config.schema import Config
from rcpo.runs.folder import RunFolder

LAYOUTS = (Layout(1, 8), Layout(1, 1), Layout(2, 4), Layout(2, 1))
STEERED = ("calibration.feedback.every=2", "calibration.feedback.pairs=3", "calibration.feedback.low=-1")
CASES = {
    Case("dpo", "off", "llama-tied", "adamw"): (),
    Case("dpo", "on", "neox", "adamw"): (),
    Case("simpo", "off", "neox-tied", "adamw"): (),
    Case("simpo", "on", "llama-tied", "adamw"): (),
    Case("dpo", "fixed", "neox-tied", "adamw"): ("calibration.alpha=1.05",),
    # Two steps of new pairs, then the probe: every second step, three of the six held-out pairs.
    Case("dpo", "feedback", "llama", "adamw"): STEERED,
    Case("dpo", "balance", "llama", "adamw"): ("calibration.balance.every=2", "calibration.balance.pairs=3"),
    Case("simpo", "feedback", "neox", "adamw"): (*STEERED, "calibration.feedback.source=probe"),
}
"""Each with its further overrides."""
ALWAYS = [list(CASES)[idx] for idx in (0, 3, 5, 6)]
"""off, on, feedback and balance."""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Case, Layout], tuple[Config, RunFolder]]:
    """Every case in every layout, by one launch of one rank and one of two."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    asked = {params["case"] for params in asked_for(request)}
    for case, words in CASES.items():
        for layout in LAYOUTS if case in asked else ():
            config = make_config(inputs, folder / f"{case}-{layout}", case, layout, *words)
            made[case, layout] = config, make_run(config)
    for num_ranks in (1, 2):
        mine = [run for (_, layout), (_, run) in made.items() if layout.ranks == num_ranks]
        train_all(mine, num_ranks, timeout_seconds=200)
    return made


@pytest.mark.timeout(500)
@pytest.mark.parametrize("case", matrix(CASES, ALWAYS.__contains__, "rows of matrices"), ids=str)
def test_every_split_of_the_batch_trains_as_the_plain_loop(
    case: Case, runs: dict[tuple[Case, Layout], tuple[Config, RunFolder]]
) -> None:
    """8 x 1 = 1 x 8 = 2 ranks x 4 x 1 = 2 ranks x 1 x 4: weights to 1e-5, every metric of every step to fp32
    tolerance; with calibration, alpha has left 1."""
    config, first = runs[case, LAYOUTS[0]]
    plain = plain_run(config)
    for layout in LAYOUTS:
        run = runs[case, layout][1]
        assert_equals_plain(run, plain, 1e-5)
        assert_equal_rows(metrics(run), metrics(first))
        assert_equal_rows(run.rows(run.eval), first.rows(first.eval))
    assert (abs(metrics(first)[-1]["calibration/alpha"] - 1) > 1e-3) == (case.calibration != "off")


@pytest.mark.parametrize("case", matrix(CASES, ALWAYS.__contains__, "rows of matrices"), ids=str)
def test_training_has_moved_the_weights(
    case: Case, runs: dict[tuple[Case, Layout], tuple[Config, RunFolder]]
) -> None:
    """A thousand times the tolerance above, or equality would say nothing."""
    config, run = runs[case, LAYOUTS[0]]
    from safetensors.torch import load_file

    start = load_file(Path(config.model.path) / "model.safetensors")
    moved = max(float((weight - start[name]).abs().max()) for name, weight in final_weights(run).items())
    assert moved > 1e-2
    assert all(torch.isfinite(weight).all() for weight in final_weights(run).values())
