"""Adapters: what is added to a model and what is not moved, the reference below it, what is saved.

Adapters to start from are made with peft alone, as other tools write them. Models are loaded from folders, as
in a run; runs through DeepSpeed are in `test_adapter_runs.py`.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from helpers.adapters import base_model, logprobs, write_sft_adapter
from helpers.tiny_models import HIDDEN, MODELS, VOCABULARY, make_batch
from rcpo.common.errors import UserError
from rcpo.config.schema import LoraConfig, ModelConfig
from rcpo.models.adapters import (
    check_adapters,
    exported_tensors,
    last_block_parameters,
    lora_layers,
)
from rcpo.models.load import load_model, save_model
from rcpo.models.policy import Policy
from rcpo.models.sizes import count_parameters
from rcpo.reference.cache import weights_fingerprint

ALL_LINEAR = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}


@pytest.fixture(params=sorted(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model folder; its name is the architecture's."""
    return write_model(tmp_path, request.param)


def write_model(place: Path, name: str) -> Path:
    MODELS[name]().save_pretrained(place / name)
    return place / name


def settings(folder: Path, **lora: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), dtype="float32", lora=LoraConfig(**{"rank": 3, **lora}))


def move_adapter(model: PreTrainedModel) -> None:
    """As training would: every trainable parameter gets another value."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_a_new_adapter_changes_nothing_at_all(folder: Path) -> None:
    """B = 0: z is the base model's bit for bit, in training mode too; and after a move of the adapter it is
    not."""
    model = load_model(settings(folder))
    assert torch.equal(logprobs(model, train=True), logprobs(base_model(folder), train=True))
    move_adapter(model)
    assert (logprobs(model) - logprobs(base_model(folder))).abs().min() > 1e-3


def test_only_the_new_adapter_trains(folder: Path) -> None:
    """all-linear: every linear layer but the output projection, A (3, in) and B (out, 3) each."""
    model = load_model(settings(folder))
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapted = {name.rpartition(".lora_")[0] for name in trainable}
    assert {name.rpartition(".")[2] for name in adapted} == ALL_LINEAR[folder.name.removesuffix("-tied")]
    plain = dict(base_model(folder).named_parameters())
    sizes = [3 * sum(plain[f"{name}.weight"].shape) for name in adapted]
    assert sum(parameter.numel() for parameter in trainable.values()) == sum(sizes)
    total = sum(parameter.numel() for parameter in plain.values())
    assert count_parameters(model) == (sum(sizes), total + sum(sizes))
    assert count_parameters(base_model(folder)) == (total, total)


def test_the_log_says_how_many_parameters_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """neox: 2 blocks x 3 x (16 + 48) = 384 with the attention's input alone."""
    folder = write_model(tmp_path, "neox")
    with caplog.at_level("INFO"):
        load_model(settings(folder, targets=["query_key_value"]))
    total = count_parameters(base_model(folder))[0] + 384
    assert f"trainable parameters: 384 of {total} ({38400 / total:.2f} %)" in caplog.text


@pytest.mark.parametrize("on_adapter", ["merge", "stack"])
def test_the_reference_has_the_adapter_below(folder: Path, tmp_path: Path, on_adapter: str) -> None:
    """Before training z is that of base + SFT adapter, as peft computes it, also in training mode: the frozen
    adapter's own dropout is off. It differs from the base model's."""
    sft = write_sft_adapter(folder, tmp_path / "sft")
    model = load_model(settings(folder, adapter=str(sft), on_adapter=on_adapter))
    expected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), sft)
    z = logprobs(expected.get_base_model())
    torch.testing.assert_close(logprobs(model, train=True), z, rtol=0, atol=2e-5)
    assert (z - logprobs(base_model(folder))).abs().max() > 0.1
    frozen = [
        name for name, parameter in model.named_parameters() if "below" in name and parameter.requires_grad
    ]
    assert frozen == []
    assert any("below" in name for name, _ in model.named_parameters()) == (on_adapter == "stack")
    assert len({name.rpartition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}) == (
        len(lora_layers(model))
    )


@pytest.mark.parametrize("on_adapter", [None, "merge", "stack"])
@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_what_is_saved_is_the_trained_policy(
    folder: Path, tmp_path: Path, on_adapter: str | None, save: str
) -> None:
    """from_pretrained(final) gives the policy's z: a whole model without a trace of peft, or an adapter of
    the original base, the one below included (targets that overlap, and that do not)."""
    below = {} if on_adapter is None else {"adapter": str(write_sft_adapter(folder, tmp_path / "sft"))}
    for number, targets in enumerate(
        ("all-linear", [sorted(ALL_LINEAR[folder.name.removesuffix("-tied")])[0]])
    ):
        model = load_model(settings(folder, targets=targets, on_adapter=on_adapter, save=save, **below))
        move_adapter(model)
        final = tmp_path / f"final-{number}"
        weights = {name: read().clone() for name, _, read in exported_tensors(model)}
        save_model(model, weights, tiny_tokenizer(), final)
        files = {path.name for path in final.iterdir()}
        assert ("adapter_config.json" in files, "config.json" in files) == (
            save == "adapter",
            save == "merged",
        )
        assert (files & {"model.safetensors", "adapter_model.safetensors"}) == {
            "model.safetensors" if save == "merged" else "adapter_model.safetensors"
        }
        loaded = AutoModelForCausalLM.from_pretrained(final)
        torch.testing.assert_close(logprobs(loaded), logprobs(model), rtol=0, atol=5e-5)
        if save == "merged":
            names = [set(load_file(one / "model.safetensors")) for one in (final, folder)]
            assert names[0] == names[1]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{idx}": idx for idx in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))


def test_a_merged_weight_is_w_plus_scaled_ba(tmp_path: Path) -> None:
    """W + (alpha / rank) B A with alpha 12 and rank 3: 4 B A."""
    folder = write_model(tmp_path, "llama")
    model = load_model(settings(folder, alpha=12.0, targets=["o_proj"]))
    move_adapter(model)
    layer = model.model.layers[0].self_attn.o_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = base_model(folder).model.layers[0].self_attn.o_proj.weight + 4 * b @ a
    exported = {name: read() for name, _, read in exported_tensors(model)}
    torch.testing.assert_close(
        exported["model.layers.0.self_attn.o_proj.weight"], expected, rtol=0, atol=1e-6
    )
    assert not any("lora" in name or "base_layer" in name for name in exported)


def test_an_adapter_of_peft_says_what_it_belongs_to(tmp_path: Path) -> None:
    """adapter_config.json: absolute path of the base model's folder, rank, alpha; A and B inside, and none of
    the model's buffers."""
    folder = write_model(tmp_path, "llama")
    model = load_model(settings(folder, alpha=12.0, save="adapter", targets=["q_proj"]))
    weights = {name: read().clone() for name, _, read in exported_tensors(model)}
    save_model(model, weights | {"model.mask": torch.ones(1)}, tiny_tokenizer(), tmp_path / "f")
    config = json.loads((tmp_path / "f" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 12.0, ["q_proj"])
    tensors = load_file(tmp_path / "f" / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    assert shapes == {
        stem.format(layer, side): (3, HIDDEN) if side == "A" else (HIDDEN, 3)
        for layer in (0, 1)
        for side in "AB"
    }


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_last_block_parameters_are_the_last_blocks_adapters(tmp_path: Path, name: str) -> None:
    """Block 1 of 2; not the frozen adapter below; UserError where the last block has none."""
    folder = write_model(tmp_path, name)
    sft = write_sft_adapter(folder, tmp_path / "sft")
    model = load_model(settings(folder, adapter=str(sft), on_adapter="stack"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [names[parameter] for parameter in last_block_parameters(model)]
    assert len(found) == 2 * len(ALL_LINEAR[name])
    assert all("layers.1." in one and ".default." in one for one in found)
    only_first = "model.layers.0.mlp.up_proj" if name == "llama" else "gpt_neox.layers.0.mlp.dense_h_to_4h"
    for config in (settings(folder, targets=[only_first]), ModelConfig(path=str(folder), dtype="float32")):
        with pytest.raises(
            UserError, match=r"^calibration\.scope=lora_last: .* has no trainable adapter; type "
        ):
            last_block_parameters(load_model(config))


def test_dropout_acts_in_training_passes_alone_and_is_seeded(tmp_path: Path) -> None:
    """B away from 0: two training passes differ, the same seed repeats one, evaluation has none."""
    model = load_model(settings(write_model(tmp_path, "llama"), dropout=0.4))
    move_adapter(model)
    seen = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        seen.append(logprobs(model, train=True))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(logprobs(model), logprobs(model))


def test_the_adapters_start_depends_on_the_seed_alone(tmp_path: Path) -> None:
    """Not on random numbers drawn before, and it draws none of the run's own."""
    folder = write_model(tmp_path, "llama")

    def first_a(seed: int, num_draws: int) -> Tensor:
        torch.manual_seed(seed)
        torch.rand(num_draws)
        before = torch.get_rng_state()
        model = load_model(settings(folder))
        assert torch.equal(before, torch.get_rng_state())
        return lora_layers(model)[0][1].lora_A["default"].weight.detach()

    assert torch.equal(first_a(5, 0), first_a(5, 100))
    assert not torch.equal(first_a(5, 0), first_a(6, 0))


def test_gradient_checkpointing_gives_the_same_gradients(folder: Path) -> None:
    """Of all adapters, in the first block too: nothing below it needs a gradient."""
    gradients = []
    for checkpointing in (False, True):
        model = load_model(dataclasses.replace(settings(folder), gradient_checkpointing=checkpointing))
        move_adapter(model)
        Policy(model).train()(make_batch(3)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_the_fingerprint_counts_what_lies_below(tmp_path: Path) -> None:
    """The reference cache: a new adapter shares the plain run's rows; an adapter below has its own, by its
    content and by merge or stack, wherever its folder lies."""
    folder = write_model(tmp_path, "llama")
    one, copy, other = (
        write_sft_adapter(folder, tmp_path / name, rank=rank)
        for name, rank in (("one", 2), ("copy", 2), ("other", 3))
    )
    plain = weights_fingerprint(ModelConfig(path=str(folder), dtype="float32"))
    assert weights_fingerprint(settings(folder, rank=8)) == plain

    def fingerprint(adapter: Path, on_adapter: str) -> str:
        return weights_fingerprint(settings(folder, adapter=str(adapter), on_adapter=on_adapter))

    assert fingerprint(one, "stack") == fingerprint(copy, "stack")
    seen = {plain, fingerprint(one, "stack"), fingerprint(one, "merge"), fingerprint(other, "stack")}
    assert len(seen) == 4


def line(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_targets_that_cannot_be_are_named(tmp_path: Path) -> None:
    """A name that no linear layer has, with the names there are; the output projection."""
    folder = write_model(tmp_path, "neox")
    assert line(lambda: load_model(settings(folder, targets=["q_proj"]))) == (
        "model.lora.targets: q_proj is no linear layer of GPTNeoXForCausalLM; "
        "it has dense, dense_4h_to_h, dense_h_to_4h, query_key_value"
    )
    model = base_model(folder)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert line(lambda: load_model(settings(folder, targets=["dense", head]))) == (
        f"model.lora.targets: {head} is the output projection, which stays frozen in an adapter run; "
        "leave it out"
    )


def damaged(place: Path, change: Callable[[Path], None]) -> Path:
    change(place)
    return place


def set_entry(key: str, value: object) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps(config | {key: value}))

    return change


def pickled(place: Path) -> None:
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")


WRONG_ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "dora": (set_entry("use_dora", True), r"has use_dora=true, which rcpo does not load; merge it"),
    "whole modules": (
        set_entry("modules_to_save", ["lm_head"]),
        r'has modules_to_save=\["lm_head"\], which rcpo',
    ),
    "not lora": (set_entry("peft_type", "IA3"), r'has peft_type="IA3", which rcpo does not load'),
    "no json": (
        lambda place: (place / "adapter_config.json").write_text("{"),
        r"adapter_config\.json is not JSON",
    ),
    "no config": (
        lambda place: (place / "adapter_config.json").unlink(),
        r"has no adapter_config\.json; give an adapter's folder$",
    ),
    "pickled": (pickled, r"has no adapter_model\.safetensors; convert its pickled weights to safetensors"),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", WRONG_ADAPTERS)
def test_adapters_that_cannot_be_loaded_are_found_before_the_run(tmp_path: Path, name: str) -> None:
    change, expected = WRONG_ADAPTERS[name]
    folder = write_model(tmp_path, "llama")
    sft = damaged(write_sft_adapter(folder, tmp_path / "sft"), change)
    said = line(lambda: check_adapters(settings(folder, adapter=str(sft), on_adapter="stack")))
    assert re.search(f"^model\\.lora\\.adapter={re.escape(str(sft))}: {expected}", said), said


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    """Other modules; the same modules in another shape; and a path that is nothing."""
    llama, neox = write_model(tmp_path, "llama"), write_model(tmp_path, "neox")
    of_neox = write_sft_adapter(neox, tmp_path / "of-neox")
    assert "model.lora.adapter=" in line(
        lambda: load_model(settings(llama, adapter=str(of_neox), on_adapter="merge"))
    )
    sft = write_sft_adapter(llama, tmp_path / "sft")
    set_entry("r", 4)(sft)
    assert "q_proj.lora_A.weight is (2, 16) in it and (4, 16) in LlamaForCausalLM" in line(
        lambda: load_model(settings(llama, adapter=str(sft), on_adapter="stack"))
    )
    said = line(lambda: check_adapters(settings(llama, adapter="./nothing", on_adapter="stack")))
    assert said == "model.lora.adapter=./nothing: no such folder; give an adapter's folder or hub id"


def test_a_missing_peft_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert line(lambda: check_adapters(settings(tmp_path))) == (
        "model.lora.rank=3: needs the peft package; pip install peft"
    )
    quantized = ModelConfig(path="p", quantization="4bit", lora=LoraConfig(rank=None))
    assert line(lambda: check_adapters(quantized)) == (
        "model.quantization=4bit: needs the bitsandbytes package; pip install 'rcpo[quantization]'"
    )
