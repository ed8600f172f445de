"""Models: the shipped presets, what is refused when a model is loaded, and what loading sets."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from helpers import forked
from helpers.tiny_models import VOCABULARY, make_neox
from rcpo.common.conf import conf_dir
from rcpo.common.errors import UserError
from rcpo.config.schema import LoraConfig, ModelConfig
from rcpo.config.validate import validate
from rcpo.models.load import load_model, model_place

PRESETS = sorted(
    {path.stem for path in (conf_dir() / "model").glob("*.yaml")} - {"hf", "tiny", "tiny_vision"}
)
UNTUNED = {"internvl3", "llava_1_5", "qwen2_5_vl_3b", "qwen2_5_vl_7b", "smolvlm"}
"""In no recipe that rcpo knows of."""
COMPOSE = """
import json, sys
from rcpo.config.compose import compose
print(json.dumps([compose(words) for words in json.load(sys.stdin)]))
"""


def text(preset: str) -> str:
    return (conf_dir() / "model" / f"{preset}.yaml").read_text()


def tuning(preset: str) -> list[str]:
    """The overrides that the preset's comments give."""
    comments = " ".join(line[1:] for line in text(preset).splitlines() if line.startswith("#"))
    return re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+=[\w.+-]*\w", comments)


@pytest.fixture(scope="module")
def composed(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Each preset's tree, plain and with the tuning in its comments; composed in one process."""
    lines = []
    for preset in PRESETS:
        lines += [[f"model={preset}"], [f"model={preset}", "objective=simpo", *tuning(preset)]]
    done = forked.script(COMPOSE, cwd=tmp_path_factory.mktemp("elsewhere"), input=json.dumps(lines))
    assert done.returncode == 0, done.stderr
    trees = iter(json.loads(done.stdout))
    return {preset: (next(trees), next(trees)) for preset in PRESETS}


def test_the_presets_of_the_issue_are_there() -> None:
    assert set(PRESETS) >= {
        "smollm2_135m", "pythia_410m", "pythia_1_4b", "pythia_2_8b", "mistral_7b_sft", "qwen2_5_7b_instruct",
        "llama3_8b_sft",
    }  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_every_key_of_the_model_and_no_other(
    composed: dict[str, tuple[dict[str, Any], dict[str, Any]]], preset: str
) -> None:
    """It validates; a hub id, an attention kernel that needs no further package, no foreign code."""
    model = validate(composed[preset][0]).model
    assert set(composed[preset][0]["model"]) == set(
        yaml.safe_load((conf_dir() / "every_model.yaml").read_text())
    )
    assert re.fullmatch(r"[\w-]+/[\w.-]+", model.path)
    assert (model.attention, model.dtype, model.trust_remote_code) == ("sdpa", "auto", False)
    assert model.quantization is None
    assert model.chat_template == ("plain" if preset.startswith("pythia") else None)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_tuning_in_a_presets_comments_can_be_typed(
    composed: dict[str, tuple[dict[str, Any], dict[str, Any]]], preset: str
) -> None:
    """With objective=simpo, each KEY=VALUE exists and validates; a learning rate is among them where somebody
    has tuned it."""
    words = tuning(preset)
    assert any(word.startswith("optim.lr=") for word in words) == (preset not in UNTUNED)
    tree = composed[preset][1]
    validate(tree)
    for word in words:
        key, value = word.split("=")
        node: Any = tree
        for part in key.split("."):
            node = node[part]
        assert node == yaml.safe_load(value) or float(node) == float(value), word


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip
LLAMA_LIKE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MistralConfig(**SMALL, num_key_value_heads=1), LLAMA_LIKE),
        (Qwen2Config(**SMALL, num_key_value_heads=1), LLAMA_LIKE),
        (GPTNeoXConfig(**SMALL), {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_all_linear_is_the_papers_list(tmp_path: Path, config: PreTrainedConfig, expected: set[str]) -> None:
    """The recipes of arXiv 2604.18239 name these layers for Mistral, Qwen2.5 and Pythia."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path), dtype="float32", lora=LoraConfig(rank=1)))
    adapted = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in adapted} == expected


def line(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        model_place(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_are_no_models_are_named(tmp_path: Path) -> None:
    """A file; nothing; no config.json; no weights; pickled weights."""
    (tmp_path / "file").write_text("")
    assert line(tmp_path / "file").endswith("is a file; it must be a folder with config.json and weights")
    assert line("./nothing").endswith("no such folder; give a model folder, a hub id or builtin:tiny")
    assert line("cell:sft").endswith("can name; give its folder, SWEEP/cells/NAME/final")
    assert line("a/b/c").endswith("no such folder; give a model folder, a hub id or builtin:tiny")
    assert line(tmp_path).endswith("has no config.json, so it is no model folder; give another")
    (tmp_path / "config.json").write_text("{}")
    assert line(tmp_path).endswith("has no *.safetensors weights; give the folder of a whole model")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert line(tmp_path).endswith(
        "has no *.safetensors weights, only pickled ones; convert them, or type model.allow_pickle=true to "
        "load tensors, and nothing but tensors, from them"
    )
    assert model_place(str(tmp_path), allow_pickle=True) == str(tmp_path)


def test_the_policys_own_dropout_is_off(tmp_path: Path) -> None:
    """Both of GPT-NeoX's, though the folder's config asks for them: two training passes are equal."""
    model = make_neox()
    model.config.hidden_dropout = model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(path=str(tmp_path), dtype="float32")).train()
    assert (loaded.config.hidden_dropout, loaded.config.attention_dropout) == (0.0, 0.0)
    ids = torch.tensor([[1, 5, 9, 7]])
    assert torch.equal(loaded(ids).logits, loaded(ids).logits)


def message(**groups: dict[str, Any]) -> str:
    tree: dict[str, Any] = {
        "objective": {"name": "dpo"}, "calibration": {"name": "on"}, "model": {"path": "p"},
        "data": {"source": "arithmetic"}, "optim": {"name": "adamw"}, "deepspeed": {},
        "tracking": {"name": "none"}, "train": {"device": "cpu"}, "metrics": {}, "launch": {},
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        validate({group: {**values, **groups.get(group, {})} for group, values in tree.items()})
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "stage", "expected"),
    [
        (
            {"lora": {"dropout": 0.1}},
            1,
            "model.lora.dropout=0.1: has no effect without an adapter to train; "
            "type model.lora.rank=16, or model.lora.dropout=0.0",
        ),
        (
            {"lora": {"adapter": "a", "on_adapter": "merge"}},
            1,
            "model.lora.adapter=a: has no effect without an adapter to train; "
            "type model.lora.rank=16, or model.lora.adapter=null",
        ),
        (
            {"lora": {"rank": 4, "adapter": "a"}},
            1,
            "model.lora.adapter=a: must be merged into the base or kept frozen beside the new one; "
            "type model.lora.on_adapter=merge or model.lora.on_adapter=stack",
        ),
        (
            {"lora": {"rank": 4, "on_adapter": "stack"}},
            1,
            "model.lora.on_adapter=stack: there is no adapter to stack; type model.lora.adapter=PATH",
        ),
        (
            {"lora": {"rank": 4, "targets": []}},
            1,
            "model.lora.targets=[]: names no layer; type model.lora.targets=all-linear",
        ),
        ({"lora": {"rank": 0}}, 1, "model.lora.rank=0: must be greater than 0; type model.lora.rank=VALUE"),
        (
            {"lora": {"rnak": 4}},
            1,
            "model.lora.rnak: no such key; `rcpo train --help` lists them (remove +model.lora.rnak=...)",
        ),
        (
            {"quantization": "4bit"},
            1,
            "model.quantization=4bit: quantized weights cannot train, so it needs an adapter; "
            "type model.lora.rank=16",
        ),
        (
            {"quantization": "4bit", "lora": {"rank": 4}},
            1,
            "model.lora.save=merged: cannot be done with 4-bit weights; type model.lora.save=adapter",
        ),
        (
            {"quantization": "4bit", "lora": {"rank": 4, "adapter": "a", "on_adapter": "merge"}},
            1,
            "model.lora.on_adapter=merge: cannot be done with 4-bit weights; "
            "type model.lora.on_adapter=stack",
        ),
        (
            {"quantization": "4bit", "lora": {"rank": 4, "save": "adapter"}},
            3,
            "deepspeed.stage=3: does not shard 4-bit weights here; type deepspeed.stage=2",
        ),
    ],
)
def test_adapter_options_that_cannot_be(model: dict[str, Any], stage: int, expected: str) -> None:
    assert message(model={"path": "p", **model}, deepspeed={"stage": stage}) == expected


def test_one_target_may_be_typed_without_brackets() -> None:
    adapter = ModelConfig(path="p", lora=LoraConfig(rank=4, targets="q_proj")).lora  # type: ignore[arg-type]
    assert adapter.targets == ["q_proj"]
