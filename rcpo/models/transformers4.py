"""A model folder as transformers 4 reads it, made from one that transformers 5 wrote.

Both read the same weights and the same tokenizer.json. What differs is in config.json, where 5 has the
settings of rotary positions in one dictionary, and in tokenizer_config.json, whose class 4 does not have.
transformers 4 would not complain of the first: it would go on with its defaults. Called by `rcpo export`.
"""

import json
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError

VERSION = "4.57"
"""The last one; older ones read the same places, of fewer architectures."""
READ_BY_4 = frozenset((
    "arcee", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2", "ctrl", "deepseek_v3",
    "diffllama", "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_h1",
    "falcon_mamba", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granitemoe",
    "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba",
    "jetmoe", "lfm2", "llama", "llama4_text", "mamba", "minimax", "ministral", "mistral", "mixtral", "mpt",
    "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "recurrent_gemma", "rwkv",
    "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm",
))  # fmt: skip
"""Values of model_type that were written by `for_transformers4` and read by that version, logits and all."""
ROPE_KEYS = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
"""Names of the base and of the share of a head that turns, where they are not those of all others."""
LOCAL_BASE = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq"}
"""Name of the base of layers with a window, where it is another than that of the others."""
RENAMED = {"qwen3_moe": {"num_local_experts": "num_experts"}}
"""Entries that had another name."""
MAMBA = {"linear_attention": "mamba", "full_attention": "attention"}
BLOCK_NAMES = {"granitemoehybrid": MAMBA, "zamba": MAMBA, "zamba2": MAMBA}
"""What the kinds of a model's blocks were called, where it is not what they are called now."""


def for_transformers4(folder: Path) -> None:
    """Rewrite the JSON files of a model folder, or of an adapter's, in place.

    Raises UserError for an architecture that transformers 4 was not seen to read, and for settings that have
    no place there.
    """
    config = folder / "config.json"
    if config.is_file():
        entries = _read(config)
        kind = entries.get("model_type")
        if kind not in READ_BY_4:
            raise UserError(
                f"--transformers4: transformers {VERSION} was not seen to read model_type={kind} rightly; "
                "leave the word out and load the folder with transformers 5"
            )
        _write(config, config_for_4(entries))
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        template = folder / "chat_template.jinja"
        entries = tokenizer_for_4(_read(tokenizer), (folder / "tokenizer.json").is_file())
        if template.is_file():
            entries["chat_template"] = template.read_text(encoding="utf-8")
            template.unlink()
        _write(tokenizer, entries)


def has_capped_attention(folder: Path) -> bool:
    """Whether attention has a soft cap, as Gemma 2's: transformers 4 takes sdpa, which leaves it out."""
    config = folder / "config.json"
    return config.is_file() and bool(_read(config).get("attn_logit_softcapping"))


def config_for_4(entries: dict[str, Any]) -> dict[str, Any]:
    """config.json with rotary positions, dtype and nested configs in their old places."""
    kind = str(entries.get("model_type"))
    old: dict[str, Any] = {}
    for key, value in entries.items():
        if key.endswith("_config") and isinstance(value, dict):
            value = config_for_4(value)
        elif key in ("layer_types", "layers_block_type") and kind in BLOCK_NAMES:
            value = [BLOCK_NAMES[kind].get(name, name) for name in value]
        old[RENAMED.get(kind, {}).get(key, key)] = _plain_floats(value)
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    rope = old.pop("rope_parameters", None)
    if rope:
        old |= _rope_for_4(kind, rope)
    return old


def _plain_floats(value: Any) -> Any:
    """{"__float__": "Infinity"} as the number that it is."""
    if isinstance(value, list):
        return [_plain_floats(each) for each in value]
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return value


def _rope_for_4(kind: str, rope: dict[str, Any]) -> dict[str, Any]:
    base, share = ROPE_KEYS.get(kind, ("rope_theta", "partial_rotary_factor"))
    by_layer = {name: each for name, each in rope.items() if isinstance(each, dict)}
    if not by_layer:
        scaling = _scaling(rope)
        if kind == "phi3" and scaling is not None:  # it takes these three and no more
            scaling = {key: scaling[key] for key in ("type", "short_factor", "long_factor")}
        found = {base: rope["rope_theta"], "rope_scaling": scaling}
        return found | ({share: rope["partial_rotary_factor"]} if "partial_rotary_factor" in rope else {})
    far, near = by_layer.get("full_attention"), by_layer.get("sliding_attention")
    local_base = LOCAL_BASE.get(kind)
    if (
        far is None or near is None or len(by_layer) > 2 or _scaling(near) is not None
        or (local_base is None and near["rope_theta"] != far["rope_theta"])
    ):  # fmt: skip
        raise UserError(
            f"--transformers4: the rope settings of model_type={kind} differ by layer in a way that "
            "transformers 4 has no place for; leave the word out and load the folder with transformers 5"
        )
    found = {base: far["rope_theta"], "rope_scaling": _scaling(far)}
    return found | ({local_base: near["rope_theta"]} if local_base is not None else {})


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """rope_scaling, with the type under both of its names; None where nothing is scaled."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    kept = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return kept | {"rope_type": kind, "type": kind}


def tokenizer_for_4(entries: dict[str, Any], is_fast: bool) -> dict[str, Any]:
    """tokenizer_config.json with a class that transformers 4 has: the one that reads tokenizer.json as it is,
    where there is one."""
    old = {key: value for key, value in entries.items() if key != "backend"}
    if is_fast:
        old["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(old.get("extra_special_tokens"), list):
        old["additional_special_tokens"] = old.pop("extra_special_tokens")
    return old


def _read(file: Path) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return entries


def _write(file: Path, entries: dict[str, Any]) -> None:
    file.write_text(
        json.dumps(entries, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
