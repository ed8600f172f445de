"""Folders that are no whole model, or two models, as model.path and reference.path: one line with the words
to type, and the words work. And models that are code of their own."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.adapters import logprobs, write_sft_adapter
from helpers.tiny_models import MODELS
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.schema import ModelConfig
from rcpo.config.validate import validate
from rcpo.models.checks import check_model
from rcpo.models.load import load_model, load_tokenizer, model_place, save_model
from rcpo.reference.weights import check_reference

PLAIN = ["train.device=cpu", "model.dtype=float32"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder with a tokenizer that has as many tokens as the model, about."""
    folder = tmp_path / "llama"
    MODELS["llama"]().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path) -> Path:
    return write_sft_adapter(base, base.parent / "sft")


def said(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        model_place(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def typed(words: str) -> ModelConfig:
    return resolve(validate(compose([*PLAIN, *shlex.split(words)])), 1).model


def test_the_words_for_an_adapter_without_its_model_can_be_typed(base: Path, adapter: Path) -> None:
    """They give the adapter's own model at the start: z is that of peft's merged one."""
    line = said(adapter)
    words = f"model.path={base} model.lora.adapter={adapter} model.lora.on_adapter=merge model.lora.rank=2"
    assert line == (
        f"model.path={adapter}: is an adapter without its model; type {words}, or give the model that peft's "
        "merge_and_unload makes"
    )
    merged = AutoModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logprobs(load_model(typed(words))), logprobs(merged), rtol=0, atol=1e-4)


def test_the_builtin_model_is_typed_by_its_name(tmp_path: Path) -> None:
    folder = {"base_model_name_or_path": model_place("builtin:tiny"), "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(folder))
    assert "type model.path=builtin:tiny model.lora.adapter=" in said(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "type model.path=ITS_MODEL model.lora.adapter=" in said(tmp_path)


def test_an_adapter_beside_whole_weights_is_refused_with_words_that_work(base: Path, adapter: Path) -> None:
    """transformers would put it on the weights. After the move that the line asks for, model.path is the
    whole weights alone, and with the other words both."""
    plain = logprobs(load_model(ModelConfig(path=str(base), dtype="float32")))
    both = logprobs(AutoModelForCausalLM.from_pretrained(adapter))
    assert (plain - both).abs().max() > 0.1
    for file in adapter.glob("adapter_*"):
        shutil.move(file, base)
    by_transformers = logprobs(AutoModelForCausalLM.from_pretrained(base))
    torch.testing.assert_close(by_transformers, both, rtol=0, atol=1e-4)
    line = said(base)
    words = f"model.lora.adapter={base}-adapter model.lora.on_adapter=merge model.lora.rank=2"
    assert line == (
        f"model.path={base}: has an adapter (adapter_config.json) beside whole weights, so it is two models; "
        f"move {base}/adapter_* to {base}-adapter/ and type model.path={base} for the whole weights alone, "
        f"with {words} for both"
    )
    Path(f"{base}-adapter").mkdir()
    for file in base.glob("adapter_*"):
        shutil.move(file, f"{base}-adapter")
    assert torch.equal(logprobs(load_model(typed(f"model.path={base}"))), plain)
    found = logprobs(load_model(typed(f"model.path={base} {words}")))
    torch.testing.assert_close(found, both, rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_whole", [True, False])
def test_as_a_reference_either_is_refused_in_its_own_words(tmp_path: Path, is_whole: bool) -> None:
    """Silently used before: the reference was another model than its folder's weights."""
    folder = tmp_path / "reference"
    shutil.copytree(model_place("builtin:tiny"), folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "r": 8}')
    if not is_whole:
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = resolve(validate(compose(["objective=dpo", f"reference.path={folder}", *PLAIN])), 1)
    with pytest.raises(UserError) as caught:
        check_reference(config, load_tokenizer(config.model), 8)
    expected = (
        f"has an adapter (adapter_config.json) beside whole weights, so it is two models; move {folder}/"
        f"adapter_* to {folder}-adapter/ and type reference.path={folder} for the whole weights alone"
        if is_whole
        else "is an adapter without its model; give the model that peft's merge_and_unload makes, or for a "
        f"policy that starts from the adapter too, type model.path=org/base model.lora.adapter={folder} "
        "model.lora.on_adapter=merge model.lora.rank=8 reference.path=null"
    )
    assert str(caught.value) == f"reference.path={folder}: {expected}"


def test_a_hub_id_with_both_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's files would lie here: an adapter_config.json, and whole weights or not."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "r": 8}')
    monkeypatch.setattr("rcpo.models.load.hub_folder", lambda *args: tmp_path)
    words = "model.lora.adapter={} model.lora.on_adapter=merge model.lora.rank=8"
    for names, expected in (
        (["adapter_config.json"], f"type model.path=org/base {words.format('org/sft')}, or give the model"),
        (
            ["config.json", "adapter_config.json"],
            "so it is two models; `hf download org/sft --local-dir sft`, move sft/adapter_* to sft-adapter/ "
            "and type model.path=sft for the whole weights alone, with "
            f"{words.format('sft-adapter')} for both",
        ),
    ):
        if "config.json" in names:
            (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError) as caught:
            check_model(ModelConfig(path="org/sft", dtype="float32"))
        assert str(caught.value).startswith("model.path=org/sft: ")
        assert expected in str(caught.value)


def test_a_run_folder_names_its_final_model(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    assert said(tmp_path).endswith(f"so it is no model folder; type model.path={tmp_path}/final")


MINE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_a_model_that_is_code_of_its_own_is_trusted_by_name(base: Path) -> None:
    """One line that says what it means; with the word typed it loads, and final/ has the code."""
    config = json.loads((base / "config.json").read_text())
    parts = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": parts}
    (base / "config.json").write_text(json.dumps(config))
    (base / "mine.py").write_text(MINE)
    with pytest.raises(UserError) as caught:
        check_model(ModelConfig(path=str(base), dtype="float32"))
    assert str(caught.value) == (
        f"model.path={base}: its config is Python code of its own, not one that transformers knows; type "
        "model.trust_remote_code=true to run that code, which may then do here whatever you may do, so read "
        "it first"
    )
    trusted = typed(f"model.path={base} model.trust_remote_code=true")
    check_model(trusted)
    model, final = load_model(trusted), base.parent / "final"
    assert type(model).__name__ == "MineForCausalLM"
    save_model(model, model.state_dict(), load_tokenizer(ModelConfig(path="builtin:tiny")), final)
    assert (final / "mine.py").read_text() == MINE
    again = load_model(typed(f"model.path={final} model.trust_remote_code=true"))
    assert torch.equal(logprobs(again), logprobs(model))
