"""Adapters in whole runs through DeepSpeed: ZeRO stages and ranks agree, the base stays, resume works."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import forked
from helpers.adapters import logprobs, write_sft_adapter
from helpers.cases import NUM_STEPS, Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import train_all
from helpers.same_run import assert_equal_rows, final_weights, metrics
from helpers.selection import asked_for, matrix
from rcpo.runs.folder import RunFolder

pytestmark = pytest.mark.ci("runs with adapters")

SECONDS = 300
LORA = ["model.lora.rank=3", "calibration.scope=head"]
ARCHITECTURES = ("llama-tied", "neox")
STAGES = (0, 1, 2, 3)
BELOW = ("merge", "stack")
KIND = "rows of matrices"
SPLITS = [(model, other) for model in ARCHITECTURES for other in ("1", "2", "3", "2ranks-2", "2ranks-3")]
ALWAYS = [("llama-tied", "2"), ("llama-tied", "3"), ("llama-tied", "2ranks-3")]


def case(model: str) -> Case:
    return Case("dpo", "on", model, "adamw")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """Every run by name, trained; of the architectures and splits of the selected tests."""
    folder = tmp_path_factory.mktemp("adapter-runs")
    inputs = folder / "inputs"
    inputs.mkdir()
    write_inputs(inputs)
    made: dict[int, dict[str, RunFolder]] = {1: {}, 2: {}}

    def add(name: str, model: str, layout: Layout, *words: str) -> None:
        config = make_config(inputs, folder / name, case(model), layout, *words)
        made[layout.ranks][name] = make_run(config)

    asked = asked_for(request)
    splits = {f"{params['model']}-{params['other']}" for params in asked if "other" in params}
    for model in dict.fromkeys(["llama-tied", *(params["model"] for params in asked)]):
        for stage in STAGES:
            add(f"{model}-{stage}", model, Layout(1, 4, stage), *LORA, "train.save_every=3")
        sft = write_sft_adapter(inputs / model, folder / f"sft-{model}")
        for how in BELOW:
            below = [f"model.lora.adapter={sft}", f"model.lora.on_adapter={how}", "model.lora.save=adapter"]
            for stage in (0, 3):
                add(f"{model}-{how}-{stage}", model, Layout(1, 8, stage), *LORA, *below)
        add(f"{model}-full", model, Layout(1, 8, 0), "calibration.scope=head", "train.steps=1")
        for stage in (2, 3):
            if f"{model}-2ranks-{stage}" in splits:
                add(f"{model}-2ranks-{stage}", model, Layout(2, 2, stage), *LORA)
    add("dropout", "llama-tied", Layout(1, 4, 1), *LORA, "model.lora.dropout=0.3", "train.save_every=3")
    for ranks, of_ranks in made.items():
        train_all(list(of_ranks.values()), ranks, SECONDS)
    return made[1] | made[2]


@pytest.mark.timeout(2 * SECONDS + 60)
@pytest.mark.parametrize(("model", "other"), matrix(SPLITS, ALWAYS.__contains__, KIND))
def test_stages_and_ranks_agree(runs: dict[str, RunFolder], model: str, other: str) -> None:
    """AdamW, eps 1e-4, 6 steps: rows to fp32 tolerance, weights to 2e-5, against ZeRO 0 on one rank."""
    assert_equal_rows(metrics(runs[f"{model}-0"]), metrics(runs[f"{model}-{other}"]))
    expected = final_weights(runs[f"{model}-0"])
    weights = final_weights(runs[f"{model}-{other}"])
    assert set(weights) == set(expected)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5, msg=name)


def of_checkpoint(run: RunFolder, step: int) -> dict[str, Tensor]:
    """The policy's tensors in DeepSpeed's own file."""
    (file,) = (run.checkpoints / f"step-{step:06d}" / "engine").rglob("*model_states.pt")
    module: dict[str, Tensor] = torch.load(file, weights_only=False)["module"]
    return module


@pytest.mark.parametrize("model", matrix(ARCHITECTURES, ARCHITECTURES[0].__eq__, KIND))
@pytest.mark.parametrize("stage", STAGES)
def test_the_adapter_moves_and_is_all_that_a_checkpoint_holds(
    runs: dict[str, RunFolder], model: str, stage: int
) -> None:
    """A and B of every adapted layer, no matter whose names tied weights have, and after 6 steps of dpo with
    calibration on every B has left 0; what has no adapter is in final/ bit for bit as it was."""
    run = runs[f"{model}-{stage}"]
    tensors = of_checkpoint(run, NUM_STEPS)
    sides = [name.rpartition(".lora_")[2] for name in tensors]
    assert sorted(set(sides)) == ["A.default.weight", "B.default.weight"]
    assert len(tensors) == 2 * sides.count("B.default.weight") > 0
    for name, tensor in tensors.items():
        if "lora_B" in name and stage != 3:  # where they are sharded, with the optimizer
            assert tensor.abs().max() > 1e-4, name
    before = load_file(runs["dropout"].path.parent / "inputs" / model / "model.safetensors")
    adapted = {name.removeprefix("model.").rpartition(".lora_")[0] + ".weight" for name in tensors}
    final = final_weights(run)
    assert adapted < set(before)
    for name in set(final) - adapted:
        assert torch.equal(final[name], before[name]), name
    for name in adapted:
        assert not torch.equal(final[name], before[name]), name


@pytest.mark.parametrize("model", matrix(ARCHITECTURES, ARCHITECTURES[0].__eq__, KIND))
def test_policy_and_reference_are_one_model_at_step_0(runs: dict[str, RunFolder], model: str) -> None:
    """Mean r of the first batch, measured in training mode against the cached reference, is 0 up to the order
    of summation; the reference of merged and stacked runs is that of base + SFT adapter, not the base's."""
    names = [f"{model}-{stage}" for stage in STAGES] + [
        f"{model}-{how}-{stage}" for how in BELOW for stage in (0, 3)
    ]
    for name in names:
        first = metrics(runs[name])[0]
        assert abs(first["displacement/chosen"]) < 2e-5, name
        assert abs(first["displacement/rejected"]) < 2e-5, name
        assert abs(metrics(runs[name])[-1]["displacement/margin"]) > 1e-3, name
    held_out = {name: load_file(runs[name].reference)["held_out_w"] for name in names}
    assert torch.equal(held_out[f"{model}-0"], held_out[f"{model}-3"])
    for how in BELOW:
        torch.testing.assert_close(
            held_out[f"{model}-{how}-0"], held_out[f"{model}-{how}-3"], rtol=0, atol=2e-5
        )
        assert (held_out[f"{model}-{how}-0"] - held_out[f"{model}-0"]).abs().max() > 0.1


@pytest.mark.parametrize("model", matrix(ARCHITECTURES, ARCHITECTURES[0].__eq__, KIND))
def test_a_frozen_head_is_measured_as_a_trained_one(runs: dict[str, RunFolder], model: str) -> None:
    """Scope head, first step, same weights and batch: the scores and the band of full fine-tuning."""
    expected = metrics(runs[f"{model}-full"])[0]
    keys = [key for key in expected if key.startswith(("score/", "band/"))]
    assert {"score/chosen_norm", "score/rejected_norm", "score/cosine", "band/center"} <= set(keys)
    for stage in STAGES:
        row = metrics(runs[f"{model}-{stage}"])[0]
        for key in keys:
            torch.testing.assert_close(row[key], expected[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("model", matrix(ARCHITECTURES, ARCHITECTURES[0].__eq__, KIND))
@pytest.mark.parametrize("how", BELOW)
def test_finals_with_an_adapter_below_load_over_the_base(
    runs: dict[str, RunFolder], model: str, how: str
) -> None:
    """At ZeRO 0 and 3 the saved adapter and the base are one policy; merged and stacked train to the same."""
    z = [
        logprobs(AutoModelForCausalLM.from_pretrained(runs[f"{model}-{one}-{stage}"].final))
        for one in BELOW
        for stage in (0, 3)
    ]
    for other in z[1:]:
        torch.testing.assert_close(other, z[0], rtol=0, atol=2e-3)
    files = {path.name for path in runs[f"{model}-{how}-3"].final.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= files
    assert "model.safetensors" not in files


@pytest.mark.timeout(180)
def test_a_resumed_run_with_dropout_is_the_same_run(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    """Dropout's random numbers are part of the checkpoint: from step 3 on, line for line."""
    run = RunFolder(tmp_path / "copy")
    shutil.copytree(runs["dropout"].path, run.path)
    shutil.rmtree(run.checkpoints / "step-000006")
    shutil.rmtree(run.final)
    run.update_run(status="interrupted")
    done = forked.rcpo("resume", run.path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    before: list[dict[str, Any]] = metrics(runs["dropout"])
    assert metrics(run) == before
    plain = metrics(runs["llama-tied-1"])
    assert plain[0]["train/loss"] == before[0]["train/loss"], "B = 0: dropout shows nothing at step 1"
    assert plain[-1]["train/loss"] != before[-1]["train/loss"]
    for name, weight in final_weights(runs["dropout"]).items():
        assert torch.equal(final_weights(run)[name], weight), name
