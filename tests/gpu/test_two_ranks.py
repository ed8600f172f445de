"""Trainings on two GPUs, as `rcpo` starts them: against one GPU, and against themselves when they are
stopped, killed, or go on elsewhere."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.cases import Case, Layout
from helpers.device_runs import ON_GPU, made, rcpo, started, trained
from helpers.same_run import assert_equal_rows, final_weights, metrics
from rcpo.common.errors import StoppedError
from rcpo.runs.folder import RunFolder

NUM_GPUS = torch.cuda.device_count() if ON_GPU else 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600 if ON_GPU else 3600),
    pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs"),
]
DPO, ADAMW = Case("dpo", "exact", "neox", "sgd"), Case("dpo", "exact", "neox", "adamw")
STEPS = 200 if ON_GPU else 16
"""Enough to be stopped among them: a GPU takes some milliseconds a step."""
SAVED = STEPS // 4
LONG = (f"train.steps={STEPS}", f"train.save_every={SAVED}", "train.eval_every=0")
SAME_GPUS = 1e-6 if ON_GPU else 0.0
"""Of weights: on GPUs sums may come in another order; on the CPU it is bit for bit."""


def assert_same_run(run: RunFolder, expected: RunFolder, tolerance: float) -> None:
    """Every metric to 2e-4, weights to `tolerance`."""
    assert_equal_rows(metrics(expected), metrics(run))
    for name, weight in final_weights(expected).items():
        torch.testing.assert_close(final_weights(run)[name], weight, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("words", [(), ("model.lora.rank=2",)], ids=["all", "lora"])
def test_two_gpus_train_as_one(inputs: Path, tmp_path: Path, stage: int, words: tuple[str, ...]) -> None:
    """1 x 8 pairs and 2 x 4, with `exact`: every metric to 2e-4, weights to 2e-5."""
    _, one = made(inputs, tmp_path / "one", DPO, Layout(1, 8, 0), *words)
    _, two = made(inputs, tmp_path / "two", DPO, Layout(2, 4, stage), *words)
    assert_same_run(trained(two), trained(one), 2e-5)


@pytest.fixture(scope="module", params=[2, 3])
def through(
    inputs: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[int, RunFolder]:
    """A stage, and its run on two GPUs that nothing stops."""
    folder = tmp_path_factory.mktemp("through") / "run"
    return request.param, trained(made(inputs, folder, DPO, Layout(2, 4, request.param), *LONG)[1])


def test_ranks_stop_together(inputs: Path, tmp_path: Path, through: tuple[int, RunFolder]) -> None:
    """SIGTERM to the launcher after a few steps: every rank leaves with a checkpoint; `rcpo resume`
    ends as the run that went through."""
    stage, whole = through
    _, stopped = made(inputs, tmp_path / "stopped", DPO, Layout(2, 4, stage), *LONG)
    with started(stopped, num_rows=2) as process:
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == StoppedError.exit_code
    num_rows = len(stopped.rows(stopped.metrics))
    assert 2 <= num_rows < STEPS
    assert (stopped.checkpoints / f"step-{num_rows:06d}").is_dir()
    assert_same_run(trained(stopped), whole, SAME_GPUS)


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_ends_the_run(
    inputs: Path, tmp_path: Path, through: tuple[int, RunFolder], number: int
) -> None:
    """SIGKILL to one rank, after a checkpoint: the launcher ends the other one within its grace, and says so;
    `rcpo resume` ends as the run that went through."""
    stage, whole = through
    _, killed = made(inputs, tmp_path / "killed", DPO, Layout(2, 4, stage), *LONG)
    with started(killed, num_rows=SAVED + 1) as process:
        ranks = process.ranks()
        assert len(ranks) == 2
        os.kill(ranks[number], signal.SIGKILL)
        assert process.wait() == 1
        said = process.said()
        assert not any(Path(f"/proc/{rank}/cmdline").exists() for rank in ranks)
    assert f"rank {number}" in said
    assert "Traceback" not in said
    assert_same_run(trained(killed), whole, SAME_GPUS)


def test_a_checkpoint_of_two_ranks_is_a_model(tmp_path: Path, through: tuple[int, RunFolder]) -> None:
    """`rcpo export` of the last step gives final/'s weights, bit for bit; of an earlier one the names and
    shapes."""
    _, whole = through
    for step in (STEPS, SAVED):
        out = tmp_path / str(step)
        done = rcpo("export", str(whole.path), str(out), f"step={step}")
        assert done.returncode == 0, done.stderr
        exported = load_file(out / "model.safetensors")
        assert exported.keys() == final_weights(whole).keys()
        same = [torch.equal(exported[name], weight) for name, weight in final_weights(whole).items()]
        assert all(same) == (step == STEPS)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_go_on_as_one(inputs: Path, tmp_path: Path, stage: int) -> None:
    """A run of two ranks goes on from its first checkpoint on one, which converts it: rows to 2e-4, weights
    to 2e-5."""
    words = ("train.steps=12", "train.save_every=4", "train.eval_every=0", "optim.eps=1e-4")
    _, run = made(inputs, tmp_path / "run", ADAMW, Layout(2, 4, stage), *words)
    rows, weights = metrics(trained(run)), final_weights(run)
    changes = ("launch.processes=1", "train.pairs_per_device=8")
    allowed = [part for word in changes for part in ("--allow-change", word)]
    done = rcpo("resume", str(run.path), "--from", "step-000004", *allowed)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert_equal_rows(rows, metrics(run))
    for name, weight in final_weights(run).items():
        torch.testing.assert_close(weight, weights[name], atol=2e-5, rtol=0, msg=name)
