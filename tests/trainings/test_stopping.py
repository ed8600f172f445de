"""A run that is asked to stop: how soon it hears, what it leaves out, and what its checkpoint costs."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.forked import in_a_fork
from helpers.rank_runs import train_here
from helpers.same_run import metrics
from rcpo.common.errors import StoppedError
from rcpo.common.files import HashedFile, sha256
from rcpo.runs.folder import RunFolder
from rcpo.training.checkpoint import check_manifest

CASE = Case("dpo", "on", "llama-tied", "adamw")
REST = pytest.mark.ci("stops in time")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def made(inputs: Path, path: Path, *words: str) -> RunFolder:
    return make_run(make_config(inputs, path, CASE, Layout(1, 4), "train.eval_every=2", *words))


def stopped(run: RunFolder, arrange: Callable[[], None]) -> str:
    """What a training in a fork, after `arrange`, says of its stop."""
    said = run.path / "said"

    def work() -> None:
        arrange()
        with pytest.raises(StoppedError) as caught:
            train_here(run)
        said.write_text(str(caught.value))

    in_a_fork(work)
    return said.read_text()


def sigterm_in_backward(number: int) -> Callable[[], None]:
    """SIGTERM in the first backward pass of optimizer step `number`, two to a step."""

    def arrange() -> None:
        from rcpo.engine.engine import Engine

        backward, passes = Engine.backward, []

        def noted(engine: Engine, loss: torch.Tensor, is_last: bool = True) -> None:
            passes.append(engine._is_rehearsal)
            if passes.count(False) == 2 * number - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            backward(engine, loss, is_last)

        Engine.backward = noted  # type: ignore[method-assign]

    return arrange


@REST
def test_a_signal_within_a_step_stops_after_that_step(inputs: Path, tmp_path: Path) -> None:
    """Step 4 is due for an evaluation, which the stop does not wait for and the resumed run makes up for:
    every row as if nothing had been."""
    run, whole = made(inputs, tmp_path / "run"), made(inputs, tmp_path / "whole")
    in_a_fork(lambda: train_here(whole))
    said = stopped(run, sigterm_in_backward(4))
    assert said.startswith("stopped by SIGTERM after step 4 of 6, with a checkpoint")
    assert [row["step"] for row in run.rows(run.metrics)] == [1, 2, 3, 4]
    assert [row["step"] for row in run.rows(run.eval)] == [0, 2]
    in_a_fork(lambda: train_here(run, resume=True))
    assert metrics(run) == metrics(whole)
    assert run.rows(run.eval) == whole.rows(whole.eval)


@REST
def test_the_end_of_the_job_s_time_stops_a_run_by_itself(inputs: Path, tmp_path: Path) -> None:
    run = made(inputs, tmp_path / "run", "train.steps=100000")

    def arrange() -> None:
        now = time.time()
        os.environ["SLURM_JOB_START_TIME"] = str(int(now) - 1000)
        os.environ["SLURM_JOB_END_TIME"] = str(int(now) + 33)

    assert "stopped by the end of the job's time after step" in stopped(run, arrange)
    done = len(run.rows(run.metrics))
    assert 0 < done < 100000
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{done:06d}"]


@REST
def test_a_rank_reads_nothing_of_what_it_has_written(inputs: Path, tmp_path: Path) -> None:
    """DeepSpeed's files are hashed while they are written; the manifest is that of their content."""
    run = made(inputs, tmp_path / "run", "train.steps=2", "train.save_every=2")
    read = run.path / "read"

    def work() -> None:
        import rcpo.common.files

        hashed = rcpo.common.files.sha256

        def noted(path: Path) -> str:
            with read.open("a") as stream:
                print(path.relative_to(run.checkpoints), file=stream)
            return hashed(path)

        rcpo.common.files.sha256 = noted
        train_here(run)

    in_a_fork(work)
    names = read.read_text().split()
    assert any("model/" in name for name in names)
    assert not any(name.endswith("_states.pt") for name in names)
    (checkpoint,) = run.checkpoints.iterdir()
    assert len(list((checkpoint / "engine").rglob("*_states.pt"))) == 2
    check_manifest(checkpoint)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_hashed_file_is_what_torch_writes(tmp_path: Path, is_zip: bool) -> None:
    tensors = {"a": torch.arange(1000.0), "b": [torch.ones(3, dtype=torch.bfloat16), "text"]}
    with HashedFile(tmp_path / "file") as stream:
        torch.save(tensors, stream, _use_new_zipfile_serialization=is_zip)
    entry = stream.entry()
    assert entry == {"bytes": (tmp_path / "file").stat().st_size, "sha256": sha256(tmp_path / "file")}
    loaded = torch.load(tmp_path / "file")
    assert torch.equal(loaded["a"], tensors["a"])
    with pytest.raises(OSError, match="No space left"), HashedFile(Path("/dev/full")) as full:
        full.write(b"x" * 100_000)
