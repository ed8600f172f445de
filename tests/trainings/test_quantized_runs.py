"""4-bit weights in whole runs, on bitsandbytes' CPU backend: they train, save and resume."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.cases import NUM_STEPS, Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import Job, do_jobs, train_all
from helpers.same_run import metrics
from rcpo.runs.folder import RunFolder

pytestmark = pytest.mark.ci("4-bit weights", needs="bitsandbytes")
SECONDS = 300
WORDS = [
    "model.lora.rank=3", "model.lora.save=adapter", "model.quantization=4bit", "calibration.scope=head",
    "train.save_every=3",
]  # fmt: skip
LAYOUTS = {"zero-0": Layout(1, 4, 0), "zero-1": Layout(1, 4, 1), "zero-2": Layout(1, 4, 2)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """One at each stage that takes 4-bit weights, trained; and one in bf16."""
    folder = tmp_path_factory.mktemp("quantized-runs")
    (folder / "inputs").mkdir()
    write_inputs(folder / "inputs")
    case = Case("dpo", "on", "llama-tied", "adamw")
    made = {
        name: make_run(make_config(folder / "inputs", folder / name, case, layout, *WORDS))
        for name, layout in LAYOUTS.items()
    }
    words = [*WORDS, "model.dtype=bfloat16"]
    made["bf16"] = make_run(make_config(folder / "inputs", folder / "bf16", case, LAYOUTS["zero-1"], *words))
    train_all(list(made.values()), 1, SECONDS)
    return made


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("name", [*LAYOUTS, "bf16"])
def test_a_resumed_run_is_the_same_run(runs: dict[str, RunFolder], name: str, tmp_path: Path) -> None:
    """From step 3 on line for line, and the adapter in final/ bit for bit."""
    whole, run = runs[name], RunFolder(tmp_path / "copy")
    shutil.copytree(whole.path, run.path)
    shutil.rmtree(run.checkpoints / f"step-{NUM_STEPS:06d}")
    shutil.rmtree(run.final)
    do_jobs([Job(str(run.path), resume=True)], 1, SECONDS)
    assert metrics(run) == metrics(whole)
    before, after = (load_file(each.final / "adapter_model.safetensors") for each in (whole, run))
    assert before.keys() == after.keys()
    for weight in before:
        assert torch.equal(before[weight], after[weight]), weight


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_base_is_quantized_and_not_in_the_checkpoint(runs: dict[str, RunFolder], name: str) -> None:
    """The rank's log counts 4-bit weights; the engine's file holds A and B alone."""
    checkpoint = runs[name].checkpoints / f"step-{NUM_STEPS:06d}"
    (file,) = (checkpoint / "engine").rglob("*model_states.pt")
    module = torch.load(file, weights_only=False)["module"]
    assert {key.rpartition(".lora_")[2] for key in module} == {"A.default.weight", "B.default.weight"}
    assert not (checkpoint / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["zero-1", "zero-2"])
def test_stages_agree(runs: dict[str, RunFolder], name: str) -> None:
    before, after = (load_file(runs[each].final / "adapter_model.safetensors") for each in ("zero-0", name))
    for weight in before:
        torch.testing.assert_close(after[weight], before[weight], rtol=0, atol=2e-5, msg=weight)
