"""Whole small trainings on a GPU, as `rcpo` starts them: against the plain loop on the CPU, against each
other, and against themselves when they are stopped."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers import device_runs
from helpers.cases import Case, Layout
from helpers.device_runs import ON_GPU, made, rcpo, started, trained, watched
from helpers.same_run import assert_equal_rows, assert_equals_plain, final_weights, metrics, plain_run
from helpers.tools import is_here
from rcpo.common.errors import NonFiniteError, StoppedError

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600 if ON_GPU else 3600)]
SIMPO = Case("simpo", "on", "llama-tied", "adamw")
DPO = Case("dpo", "exact", "neox", "sgd")
WIDE = {
    "vocab_size": 32003, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64,
}  # fmt: skip


def on_gpus_alone(reason: str) -> pytest.MarkDecorator:
    """Left out of a rehearsal, and what does the like on a CPU."""
    return pytest.mark.skipif(not ON_GPU, reason=reason)


@pytest.mark.parametrize(("case", "stage"), [*itertools.product([SIMPO], (0, 1, 2, 3)), (DPO, 2)], ids=str)
def test_every_stage_trains_as_the_plain_loop(inputs: Path, tmp_path: Path, case: Case, stage: int) -> None:
    """In fp32: weights after 6 steps to 2e-5, every number that the plain loop on the CPU knows to 1e-4."""
    config, run = made(inputs, tmp_path / "run", case, Layout(1, 4, stage))
    assert_equals_plain(trained(run), plain_run(config), 2e-5)


def test_sixteen_micro_batches_are_one(inputs: Path, tmp_path: Path) -> None:
    """8 pairs at once and one by one, in fp32: every metric to 2e-4, weights to 1e-5."""
    _, whole = made(inputs, tmp_path / "whole", DPO, Layout(1, 8))
    _, cut = made(inputs, tmp_path / "cut", DPO, Layout(1, 1))
    assert_equal_rows(metrics(trained(whole)), metrics(trained(cut)))
    for name, weight in final_weights(whole).items():
        torch.testing.assert_close(final_weights(cut)[name], weight, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_bf16_that_does_not_move_is_not_displaced(inputs: Path, tmp_path: Path, reference: str) -> None:
    """With a learning rate that changes no weight, r of the held-out pairs is 0 at every evaluation, each."""
    words = ("model.dtype=bfloat16", f"reference={reference}", "optim.lr=1e-30")
    _, run = made(inputs, tmp_path / "run", SIMPO, Layout(1, 4), *words)
    evaluations = trained(run).rows(run.eval)
    assert [row["step"] for row in evaluations] == [0, 4, 6]
    for row in evaluations:
        assert row["displacement/chosen"] == row["displacement/rejected"] == 0.0


def test_a_resumed_run_is_the_one_that_never_stopped(inputs: Path, tmp_path: Path) -> None:
    """SIGTERM after a few of 40 steps, then `rcpo resume`: weights and rows of a run that went through. On
    a GPU sums may come in another order, so weights to 1e-6; on the CPU bit for bit."""
    words = ("train.steps=40", "train.save_every=10")
    _, through = made(inputs, tmp_path / "through", SIMPO, Layout(1, 4), *words)
    trained(through)
    _, stopped = made(inputs, tmp_path / "stopped", SIMPO, Layout(1, 4), *words)
    with started(stopped, num_rows=2) as process:
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == StoppedError.exit_code
    trained(stopped)
    assert_equal_rows(metrics(through), metrics(stopped))
    for name, weight in final_weights(through).items():
        torch.testing.assert_close(
            final_weights(stopped)[name], weight, atol=1e-6 if ON_GPU else 0.0, rtol=0, msg=name
        )


def test_the_same_run_twice(inputs: Path, tmp_path: Path) -> None:
    """With train.deterministic, in bf16 and measured: every number of every row and the weights, bit for
    bit."""
    words = ("train.deterministic=true", "model.dtype=bfloat16", "model.attention=sdpa")
    runs = [trained(made(inputs, tmp_path / name, SIMPO, Layout(1, 4), *words)[1]) for name in ("a", "b")]
    first, second = map(metrics, runs)
    assert first == second
    assert len(first) == 6
    for name, weight in final_weights(runs[0]).items():
        assert torch.equal(final_weights(runs[1])[name], weight), name


@pytest.mark.parametrize("layout", ["train.share_prefix=true", "train.packing=true"])
def test_joint_layouts_train_the_same(inputs: Path, tmp_path: Path, layout: str) -> None:
    """On fewer rows: every metric to 2e-4."""
    _, padded = made(inputs, tmp_path / "padded", DPO, Layout(1, 4), "model.attention=sdpa")
    _, joined = made(inputs, tmp_path / "joined", DPO, Layout(1, 4), "model.attention=sdpa", layout)
    assert_equal_rows(metrics(trained(padded)), metrics(trained(joined)))


@on_gpus_alone("CUDA says where the host waits; trainings/test_waits.py counts reads")
def test_a_step_waits_once(inputs: Path, tmp_path: Path) -> None:
    """Whatever is measured, the host waits for the device at the one reduction of a step; the first step
    makes the optimizer's moments."""
    _, run = made(inputs, tmp_path / "run", SIMPO, Layout(1, 4), "calibration.every=2", "train.eval_every=0")
    waits = watched(run).syncs
    assert len(waits) == 6
    assert [len(each) for each in waits[1:]] == [1] * 5, waits


@on_gpus_alone("CUDA's allocator counts; trainings/test_rehearsal_peak.py counts torch's")
def test_the_rehearsal_takes_what_three_steps_take(inputs: Path, tmp_path: Path) -> None:
    """Peak memory to 5 %, of a model with 45 million parameters."""
    wide = tmp_path / "wide"
    LlamaForCausalLM(LlamaConfig(**WIDE)).save_pretrained(wide)
    AutoTokenizer.from_pretrained(inputs / "llama").save_pretrained(wide)
    words = (f"model.path={wide}", "train.steps=3", "train.eval_every=0")
    _, run = made(inputs, tmp_path / "run", SIMPO, Layout(1, 8), *words)
    seen = watched(run)
    assert 0.95 * seen.steps_bytes < seen.rehearsal_bytes < 1.05 * seen.steps_bytes


@on_gpus_alone("a GPU's memory can be cut so; trainings/test_setbacks.py cuts the process's")
def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    """With 1 % of the GPU's memory for PyTorch, the model that ships still loads; a batch of long pairs does
    not fit, and the line says what to type."""
    pair = {"chosen": "b " * 900, "rejected": "c " * 900}
    rows = "".join(json.dumps({"prompt": f"a {idx}"} | pair) + "\n" for idx in range(80))
    (tmp_path / "long.jsonl").write_text(rows)
    out = subprocess.run(
        [
            sys.executable, "-c",
            "import sys, torch; torch.cuda.set_per_process_memory_fraction(0.01); "
            "from rcpo import cli; sys.exit(cli.main())",
            "train", "objective=dpo", "data=file", f"data.path={tmp_path / 'long.jsonl'}", "tracking=none",
            f"run_dir={tmp_path / 'run'}", "train.pairs_per_step=64", "train.pairs_per_device=64",
            "data.eval_pairs=4", "train.steps=2",
        ],
        env=device_runs.environment(), capture_output=True, text=True, timeout=device_runs.SECONDS,
        check=False,
    )  # fmt: skip
    assert out.returncode == 2, out.stderr
    assert "does not fit into memory" in out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.skipif(not is_here("bitsandbytes"), reason="bitsandbytes is not installed")
def test_a_4_bit_adapter_trains(inputs: Path, tmp_path: Path) -> None:
    """QLoRA, with a checkpoint on the way: rows are whole and finite."""
    words = ("model.quantization=4bit", "model.lora.rank=2", "model.lora.save=adapter", "train.save_every=3")
    case = Case("dpo", "on", "llama", "adamw")
    _, through = made(inputs, tmp_path / "through", case, Layout(1, 4), *words)
    trained(through)
    rows = metrics(through)
    assert len(rows) == 6
    assert all(math.isfinite(row["train/loss"]) for row in rows)


def test_a_lost_number_stops_the_run(inputs: Path, tmp_path: Path) -> None:
    """A learning rate that makes numbers infinite: the run stops with its exit code, without a traceback."""
    _, run = made(inputs, tmp_path / "run", Case("dpo", "off", "llama", "sgd"), Layout(1, 4), "optim.lr=1e30")
    out = rcpo("resume", str(run.path))
    assert out.returncode == NonFiniteError.exit_code, out.stdout + out.stderr
    assert "Traceback" not in out.stderr
