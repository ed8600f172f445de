"""Architectures of many kinds: z of padded rows is the model's own, joint layouts are right or refused, and
an adapter's merged model is the model that was trained, or is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    MambaConfig,
    PreTrainedModel,
    set_seed,
)

from helpers.tiny_models import SMALL, make_pairs
from helpers.tiny_tokenizers import make_words
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.schema import LoraConfig, ModelConfig
from rcpo.config.validate import validate
from rcpo.data.batch import collate
from rcpo.data.joint import collate_joint
from rcpo.engine.memory import activation_bytes
from rcpo.models.adapters import exported_tensors
from rcpo.models.attention import refuse_joint_layout
from rcpo.models.checks import check_model
from rcpo.models.load import load_model, save_model
from rcpo.models.policy import Policy

EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "stablelm": {},
    "glm4": {},
    "bitnet": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "ctrl": {"n_embd": 32, "dff": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    | {"window_size": 4},
    "gpt_oss": EXPERTS | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "llama4_text": {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}
    | {"attention_chunk_size": 8, "num_hidden_layers": 4},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.2},
    "deepseek_v3": EXPERTS | LATENT,
    "dots1": EXPERTS | {"layer_types": ["full_attention"] * 2, "sliding_window": None},
    "qwen3_next": EXPERTS | DELTA | {"linear_num_value_heads": 4, "num_hidden_layers": 4}
    | {"shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "expand": 2, "n_groups": 2, "chunk_size": 4},
    "bamba": MAMBA2 | {"mamba_chunk_size": 4, "attn_layer_indices": [1]},
    "jamba": {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2},
    "zamba2": {"num_hidden_layers": 4, "n_mamba_heads": 8, "mamba_d_state": 8, "mamba_ngroups": 1}
    | {"chunk_size": 4, "hybrid_layer_ids": [1, 3], "layers_block_type": HYBRID, "mamba_headdim": 8}
    | {"num_mem_blocks": 1, "num_key_value_heads": 4},
}  # fmt: skip
WINDOWS = "it attends within windows"
STATE = r"a \w+ layer goes on from what stands before on the row"
NOT_JOINED = {
    "mpt": "it takes no position_ids", "gpt_neo": WINDOWS, "gpt_oss": WINDOWS, "llama4_text": WINDOWS,
    "qwen3_next": STATE, "lfm2": STATE, "mamba2": STATE, "bamba": STATE, "jamba": STATE, "zamba2": STATE,
}  # fmt: skip
"""Why a prompt cannot be computed once for both responses; those that are not here can."""
LEFT_OUT = {
    "dots1": {"gate_proj", "up_proj", "down_proj"},  # peft would move them to the fused experts
    "deepseek_v3": {"gate_proj", "up_proj", "down_proj"},
    "qwen3_next": {"gate_proj", "up_proj", "down_proj"},
    "llama4_text": {"router"},  # gives two tensors
    "phimoe": {"router"},
    "mamba2": {"out_proj"},  # kernels read the weight
    "bamba": {"mamba.out_proj"},
    "jamba": {"dt_proj"},
}
"""Linear layers that no adapter goes beside."""


def make(name: str) -> PreTrainedModel:
    set_seed(0)
    config = AutoConfig.for_model(name, **(SMALL | FAMILIES[name]))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def own_z(model: PreTrainedModel) -> Tensor:
    """(2B,) by the model's own logits, each side on a row of its own."""
    pairs = make_pairs(3, seed=3, longest=16)
    found = []
    for side in [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]:
        ids = torch.tensor([side.input_ids])
        logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        places = torch.arange(side.num_prompt - 1, side.num_tokens - 1)
        found.append(logps[places, ids[0, places + 1]].sum())
    return torch.stack(found)


def our_z(model: PreTrainedModel) -> Tensor:
    z: Tensor = Policy(model)(collate(make_pairs(3, seed=3, longest=16), pad_id=0))
    return z


@pytest.mark.parametrize("name", FAMILIES)
def test_z_and_gradient_are_the_model_s_own_and_padding_does_no_harm(name: str) -> None:
    """z of a padded grid to 1e-4 that of single rows, and the gradient of a weighted sum to 1e-3."""
    model = make(name)
    z, own = our_z(model), own_z(model)
    torch.testing.assert_close(z, own, atol=1e-4, rtol=1e-4)
    parameters = list(model.parameters())
    upstream = torch.linspace(-1, 1, len(z))
    grads = [torch.autograd.grad((upstream * each).sum(), parameters, allow_unused=True) for each in (z, own)]
    ours, theirs = (
        torch.cat(
            [
                torch.zeros(p.numel()) if g is None else g.flatten()
                for g, p in zip(side, parameters, strict=True)
            ]
        )
        for side in grads
    )
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_joint_layouts_are_right_or_refused_with_the_reason(name: str) -> None:
    model, pairs = make(name), make_pairs(3, seed=3, longest=16)
    for share_prefix, packing in ((True, False), (False, True), (True, True)):
        if name in NOT_JOINED:
            with pytest.raises(
                UserError, match=f"{type(model).__name__} cannot .*: {NOT_JOINED[name]}; or type"
            ):
                refuse_joint_layout(model, share_prefix)
        else:
            refuse_joint_layout(model, share_prefix)
            with torch.no_grad():
                joint = Policy(model)(collate_joint(pairs, 0, share_prefix, packing))
                torch.testing.assert_close(joint, our_z(model), atol=1e-4, rtol=1e-4)


def with_moved_adapter(folder: Path) -> PreTrainedModel:
    config = ModelConfig(path=str(folder), dtype="float32", lora=LoraConfig(rank=2))
    check_model(config)
    model = load_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_what_an_adapter_run_saves_is_what_it_trained(name: str, tmp_path: Path) -> None:
    """final/ of a merged adapter gives the trained z, though experts, routers and shared weights invite peft
    to adapt other tensors; and every adapter has a gradient."""
    make(name).save_pretrained(tmp_path / "base")
    if name == "zamba2":
        said = r"have one weight and an adapter each, .* type model\.lora\.save=adapter"
        with pytest.raises(UserError, match=said):
            with_moved_adapter(tmp_path / "base")
        return
    model = with_moved_adapter(tmp_path / "base")
    z = our_z(model)
    z.sum().backward()
    trained = {one: parameter for one, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in trained.values())
    for left_out in LEFT_OUT.get(name, ()):
        assert not any(re.search(rf"\.{left_out}\.lora_", one) for one in trained)
    weights = {one: read().clone() for one, _, read in exported_tensors(model)}
    weights |= {one: each for one, each in model.named_buffers() if one in model.state_dict()}
    save_model(model, weights, make_words(), tmp_path / "final")
    final, told = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    torch.testing.assert_close(our_z(final.eval()), z, atol=1e-2, rtol=1e-3)


def test_a_given_target_that_cannot_have_an_adapter_is_refused_with_its_reason(tmp_path: Path) -> None:
    expected = {
        ("llama4_text", "router"): "it gives more than a product",
        ("jamba", "dt_proj"): "JambaMambaMixer reads its weight without calling it",
        ("dots1", "gate_proj"): "peft puts it on the fused experts, which are not merged",
    }
    for (name, target), reason in expected.items():
        make(name).save_pretrained(tmp_path / name)
        lora = LoraConfig(rank=2, targets=[target])
        with pytest.raises(UserError) as caught:
            check_model(ModelConfig(path=str(tmp_path / name), dtype="float32", lora=lora))
        said = rf"^model\.lora\.targets: {target} of \w+ cannot have an adapter: {reason}; choose from "
        assert re.search(said + r".*\bq_proj\b", str(caught.value)), caught.value


def test_the_memory_of_architectures_with_other_entries_is_told() -> None:
    """By hand, fp32, eager: tokens * blocks * ((9 H + 4 I) * 4 + 2 H * 4 + 2 heads * width * 4). Mamba has no
    heads; Gemma 3n a list of inner widths, of which the largest counts."""
    config = resolve(validate(compose(["model.attention=eager", "train.device=cpu"])), 1)
    sizes = {"hidden_size": 10, "num_hidden_layers": 3}
    mamba = MambaConfig(**sizes, expand=2)
    assert activation_bytes(config, mamba, 2, 5, 4) == 2 * 5 * 3 * (
        (90 + 4 * mamba.intermediate_size) * 4 + 80
    )
    gemma = Gemma3nTextConfig(**sizes, intermediate_size=[7, 9, 8], num_attention_heads=2)
    assert activation_bytes(config, gemma, 2, 5, 4) == 2 * 5 * 3 * ((90 + 36) * 4 + 80 + 2 * 2 * 5 * 4)
