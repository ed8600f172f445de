"""Folders for transformers 4: what config.json and tokenizer_config.json say there. That version is not
installed here; rcpo/runs/README.md says what was loaded with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from helpers.cases import make_run
from helpers.tiny_models import make_llama
from rcpo.cli import dispatch
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.schema import ModelConfig
from rcpo.config.validate import validate
from rcpo.models.load import load_tokenizer, save_model
from rcpo.models.transformers4 import READ_BY_4, config_for_4, for_transformers4, tokenizer_for_4

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
SCALING3 = {key: value for key, value in LLAMA3.items() if key != "rope_theta"} | {"type": "llama3"}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

CASES: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "llama 3": (LlamaConfig(rope_parameters=LLAMA3), {"rope_theta": 500000.0, "rope_scaling": SCALING3}),
    "qwen3": (
        Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        {"rope_theta": 1e6, "rope_scaling": None},
    ),
    "gemma3": (
        Gemma3TextConfig(rope_parameters=BY_LAYER),
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0, "type": "linear"},
        },
    ),
    "neox": (
        GPTNeoXConfig(
            rope_parameters={"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}
        ),
        {"rotary_emb_base": 5e4, "rotary_pct": 0.5, "rope_scaling": None},
    ),
    "phi3 long": (
        Phi3Config(rope_parameters=LONG),
        {
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "rope_scaling": {
                "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
            },
        },
    ),
    "gpt2": (GPT2Config(), {}),
    "cohere": (CohereConfig(), {"rope_theta": 500000.0, "rope_scaling": None}),
    "qwen3 mixture": (Qwen3MoeConfig(num_experts=6), {"num_experts": 6}),
}  # fmt: skip


def written(config: PreTrainedConfig) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return entries


@pytest.mark.parametrize("name", CASES)
def test_settings_are_in_their_old_places(name: str) -> None:
    """By hand; and transformers 5, which still reads the old places, finds what it had, but for the cut of
    longrope."""
    config, expected = CASES[name]
    config.dtype = torch.bfloat16
    entries = config_for_4(written(config))
    assert not {"rope_parameters", "dtype", "num_local_experts"} & set(entries)
    assert entries["torch_dtype"] == "bfloat16"
    assert {key: entries.get(key) for key in expected} == expected
    again = AutoConfig.for_model(**entries)
    kept = {key: value for key, value in vars(again).items() if "rope" in key}
    if name != "phi3 long":
        assert kept.get("rope_parameters") == _with_type(config)


def _with_type(config: PreTrainedConfig) -> Any:
    """Its rope settings with the type under its second name too, which transformers 5 keeps."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return rope

    def named(part: dict[str, Any]) -> dict[str, Any]:
        return part if part["rope_type"] == "default" else part | {"type": part["rope_type"]}

    return {key: named(part) for key, part in rope.items()} if "full_attention" in rope else named(rope)


def test_infinity_is_a_number_there() -> None:
    entries = written(Mamba2Config())
    entries["time_step_limit"] = [0.0, {"__float__": "Infinity"}]
    assert config_for_4(entries)["time_step_limit"] == [0.0, float("inf")]


def test_a_base_that_differs_by_layer_has_no_place() -> None:
    """OLMo 3 there has one base for all layers."""
    entries = written(Olmo3Config())
    assert config_for_4(entries)["rope_theta"] == entries["rope_parameters"]["full_attention"]["rope_theta"]
    entries["rope_parameters"]["sliding_attention"]["rope_theta"] = 7.0
    with pytest.raises(UserError, match=r"^--transformers4: the rope settings of model_type=olmo3 differ"):
        config_for_4(entries)


def test_the_tokenizer_is_read_as_it_is() -> None:
    """tokenizer.json by the class that adds nothing to it; further special tokens under their old name."""
    new = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    assert tokenizer_for_4(new, is_fast=True) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
    }
    assert tokenizer_for_4({"tokenizer_class": "XLMTokenizer"}, is_fast=False) == {
        "tokenizer_class": "XLMTokenizer"
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What export needs of a run folder that is done: its config and final/."""
    place = tmp_path_factory.mktemp("run") / "run"
    config = resolve(validate(compose(["tracking=none", f"run_dir={place}"])), 1)
    run = make_run(config)
    model = make_llama()
    save_model(model, model.state_dict(), load_tokenizer(ModelConfig(path="builtin:tiny")), run.final)
    return place


def test_export_for_transformers_4(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are the same file; transformers 5 reads the folder too, logits and template."""
    out = tmp_path / "out"
    assert dispatch(["export", str(run), str(out), "--transformers4"]) == 0
    assert capsys.readouterr().out == f"wrote {out} from {run}/final\n"
    names = ("model.safetensors", "tokenizer.json")
    assert all((out / name).read_bytes() == (run / "final" / name).read_bytes() for name in names)
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 10000.0
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not (out / "chat_template.jinja").exists()
    chat = [{"role": "user", "content": "1+1="}]
    ids = torch.tensor([[1, 5, 9, 7]])
    rendered, logits = set(), []
    for folder in (out, run / "final"):
        rendered.add(AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False))
        logits.append(AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
    assert len(rendered) == 1
    assert torch.equal(*logits)


def test_an_architecture_that_was_not_seen_is_refused_and_nothing_is_written(
    run: Path, tmp_path: Path
) -> None:
    """Gemma 4 is unknown to transformers 4; Mamba 2 gave other logits there."""
    assert {"gemma4_text", "mamba2", "deepseek_v2"}.isdisjoint(READ_BY_4)
    other = tmp_path / "run"
    shutil.copytree(run, other)
    config = json.loads((other / "final" / "config.json").read_text())
    (other / "final" / "config.json").write_text(json.dumps(config | {"model_type": "mamba2"}))
    with pytest.raises(UserError) as caught:
        dispatch(["export", str(other), str(tmp_path / "out"), "--transformers4"])
    assert str(caught.value) == (
        "--transformers4: transformers 4.57 was not seen to read model_type=mamba2 rightly; leave the word "
        "out and load the folder with transformers 5"
    )
    assert not list(tmp_path.glob("*out*"))


def test_a_capped_attention_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "final" / "config.json").write_text(Gemma2Config().to_json_string())
    assert dispatch(["export", str(other), str(tmp_path / "out"), "--transformers4"]) == 0
    assert "attn_implementation='eager'" in capsys.readouterr().out


def test_an_adapter_folder_has_a_tokenizer_alone(tmp_path: Path) -> None:
    load_tokenizer(ModelConfig(path="builtin:tiny")).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    for_transformers4(tmp_path)
    entries = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert entries["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tmp_path / "adapter_config.json").read_text() == '{"r": 4}'


def test_a_saved_tokenizer_does_not_say_where_it_was_loaded(run: Path, tmp_path: Path) -> None:
    """Neither is_local and local_files_only, nor a path of this machine in any of the files."""
    copied = tmp_path / "a-model-of-mine"
    shutil.copytree(run / "final", copied)
    config = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(config | {"name_or_path": str(copied)}))
    tokenizer = load_tokenizer(ModelConfig(path=str(copied)))
    model = AutoModelForCausalLM.from_pretrained(copied)
    save_model(model, model.state_dict(), tokenizer, tmp_path / "final")
    entries = json.loads((tmp_path / "final" / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & set(entries)
    for file in (tmp_path / "final").glob("*.json"):
        assert "a-model-of-mine" not in file.read_text()
