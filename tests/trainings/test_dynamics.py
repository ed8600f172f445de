"""What `dynamics/*` promises: first-order changes of the batch's log-probabilities under plain gradient
descent, checked against what one small step really does."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.plain_loop import Sides, loss_and_incentives, summed
from helpers.rank_runs import train_all
from helpers.same_run import metrics
from rcpo.config.schema import Config
from rcpo.runs.folder import RunFolder
from rcpo.training.read_inputs import read_inputs

Runs = dict[str, tuple[Config, RunFolder]]

SGD = Case("dpo", "off", "llama", "sgd")
WATCHED = ("metrics.geometry_every=1", "calibration.scope=full", "optim.lr=1e-4", "train.grad_clip=0")
ALPHA = 1.3
CALIBRATED = ("calibration=fixed", f"calibration.alpha={ALPHA}", *WATCHED)
RUNS = {
    "dpo, weighted": (SGD, ("calibration.estimator=weighted", *CALIBRATED)),
    "simpo, weighted": (
        Case("simpo", "off", "neox-tied", "sgd"),
        ("calibration.estimator=weighted", *CALIBRATED),
    ),
    "ipo, weighted, no calibration": (
        Case("ipo", "off", "llama-tied", "sgd"),
        ("calibration.estimator=weighted", *WATCHED, "optim.lr=1e-5"),
    ),
    "dpo, mean": (SGD, ("calibration.estimator=mean", *CALIBRATED)),
}
"""At the first step of dpo all incentives are beta/2, where both estimators coincide."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Each trained for one step of 8 pairs, in micro-batches of 4."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    folder: Path = tmp_path_factory.mktemp("runs")
    made = {}
    for number, (name, (case, words)) in enumerate(RUNS.items()):
        config = make_config(inputs, folder / str(number), case, Layout(1, 4), *words, "train.steps=1")
        made[name] = config, make_run(config)
    train_all([run for _, run in made.values()], 1, timeout_seconds=200)
    return made


@pytest.mark.parametrize("name", RUNS)
def test_predicted_and_realised_changes_agree(name: str, runs: dict[str, tuple[Config, RunFolder]]) -> None:
    """Change of mean(d z) (weighted) or of mean(z) (mean) of each side over the step, in fp64 from the
    weights before and after it, per unit of learning rate: within 2 % of the dynamics/*_rate."""
    config, run = runs[name]
    inputs = read_inputs(config)
    batch = [inputs.train[idx] for idx in inputs.sampler(config).global_batch(0)]
    before, after = (_z(folder, batch) for folder in (config.model.path, str(run.final)))
    weights = Sides(torch.ones(len(batch)), torch.ones(len(batch)))
    if config.calibration.estimator == "weighted":
        _, *incentives = loss_and_incentives(config.objective["name"], before, before, batch)
        weights = Sides(*incentives)
    row = metrics(run)[0]
    assert row["calibration/alpha"] == (ALPHA if config.calibration.name == "fixed" else 1.0)
    for key, weight, start, end in zip(("chosen", "rejected"), weights, before, after, strict=True):
        realised = float((weight * (end - start)).mean()) / config.optim.lr
        assert row[f"dynamics/{key}_rate"] == pytest.approx(realised, rel=0.02), key


def _z(folder: str, batch: list) -> Sides:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        return Sides(*(side.double() for side in summed(model, batch)))
