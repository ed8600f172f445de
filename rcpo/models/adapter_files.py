"""An adapter's folder on disk, as peft writes it: where it is, what it says, what rcpo loads of it.

Reads files alone; `rcpo.models.adapters` puts what they hold into a model. Called by it, by
`rcpo.models.load` for folders that are no whole model, and by `rcpo.reference.cache`."""

import hashlib
import json
from pathlib import Path
from typing import Any

import rcpo.builtin
from rcpo.common.errors import UserError
from rcpo.config.names import BUILTIN, last_part
from rcpo.config.schema import ModelConfig
from rcpo.models.hub import ADAPTER_CONFIG, adapter_hub_folder, is_hub_id

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_CONFIG, "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before every name in an adapter file."""
PLAIN = {
    "peft_type": "LORA", "bias": "none", "modules_to_save": None, "use_dora": False, "lora_bias": False,
    "trainable_token_indices": None, "target_parameters": None, "layer_replication": None,
}  # fmt: skip
"""Entries of an adapter_config.json, with the values that rcpo loads: B A beside linear layers, no more."""


def refuse_adapter(path: str, place: str, key: str = "model.path") -> None:
    """Raise UserError where the model that `path` names, read from the folder `place`, has an
    adapter_config.json. transformers would follow it to another model's weights, or put the adapter beside it
    on the weights, without a word. `key` is the config key of `path`."""
    from transformers.utils.peft_utils import find_adapter_config_file

    found = find_adapter_config_file(place)
    if found is None:
        return
    base, rank = _base_and_rank(Path(found))
    words = "model.lora.adapter={} model.lora.on_adapter=merge " + f"model.lora.rank={rank}"
    is_reference = key != "model.path"
    if not _has_whole_weights(path, place):
        ways = [
            f"type model.path={base} {words.format(path)}",
            "give the model that peft's merge_and_unload makes",
        ]
        if is_reference:
            ways = [ways[1], f"for a policy that starts from the adapter too, {ways[0]} {key}=null"]
        raise UserError(f"{key}={path}: is an adapter without its model; {', or '.join(ways)}")
    is_folder = not is_hub_id(path)
    name = path.rstrip("/") if is_folder else path.rpartition("/")[2]
    download = "" if is_folder else f"`hf download {path} --local-dir {name}`, "
    both = "" if is_reference else f", with {words.format(f'{name}-adapter')} for both"
    raise UserError(
        f"{key}={path}: has an adapter ({CONFIG_FILE}) beside whole weights, so it is two models; {download}"
        f"move {name}/adapter_* to {name}-adapter/ and type {key}={name} for the whole weights alone{both}"
    )


def _has_whole_weights(path: str, place: str) -> bool:
    """Of a hub id the weights may not have been fetched yet: config.json is theirs."""
    if is_hub_id(path):
        return (Path(place) / "config.json").is_file()
    weights = [*Path(place).glob("*.safetensors"), *Path(place).glob("*.bin")]
    return any(not file.name.startswith("adapter_model") for file in weights)


def _base_and_rank(file: Path) -> tuple[str, int]:
    """What to type for the model that an adapter belongs to, and the adapter's rank."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        base, rank = entries.get("base_model_name_or_path"), entries.get("r")
    except (ValueError, AttributeError):
        base, rank = None, None
    for name in BUILTIN:
        if base and Path(base) == Path(rcpo.builtin.__file__).parent / last_part(name):
            base = name
    return base or "ITS_MODEL", rank if isinstance(rank, int) and rank > 0 else 16


def adapter_folder(path: str, revision: str | None = None) -> Path:
    """The folder of an adapter: `path`, or the downloaded files of a hub id at `revision`. Raises UserError
    where it is no adapter with safetensors weights."""
    folder = Path(path)
    if revision is not None and folder.is_dir():
        raise UserError(
            f"model.lora.adapter_revision={revision}: {path} is a folder, which has one state alone; type "
            "model.lora.adapter_revision=null"
        )
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise UserError(f"model.lora.adapter={path}: no such folder; give an adapter's folder or hub id")
        folder = adapter_hub_folder(path, revision, CONFIG_FILE, WEIGHTS_FILE)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        is_pickled = any(folder.glob("*.bin"))
        advice = "convert its pickled weights to safetensors" if is_pickled else "give an adapter's folder"
        raise UserError(f"model.lora.adapter={path}: has no {missing[0]}; {advice}")
    return folder


def read_adapter_config(path: str, revision: str | None = None) -> dict[str, Any]:
    """adapter_config.json, checked against `PLAIN`."""
    try:
        content = json.loads((adapter_folder(path, revision) / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"model.lora.adapter={path}: {CONFIG_FILE} is not JSON; copy it again") from None
    for key, value in PLAIN.items():
        if (content.get(key, value) or None) != (value or None):
            raise UserError(
                f"model.lora.adapter={path}: has {key}={json.dumps(content[key])}, which rcpo does not load; "
                "merge it into its model with peft and give the result as model.path"
            )
    entries: dict[str, Any] = content
    return entries


def below_fingerprint(config: ModelConfig) -> bytes:
    """What, beside the base model's files, the reference of a run depends on; empty for a plain run.

    Merged and stacked count as two: they round differently.
    """
    parts = [] if config.quantization is None else [config.quantization.encode()]
    if config.lora.adapter is not None:
        folder = adapter_folder(config.lora.adapter, config.lora.adapter_revision)
        parts.append(str(config.lora.on_adapter).encode())
        parts += [
            hashlib.blake2b((folder / name).read_bytes()).digest() for name in (CONFIG_FILE, WEIGHTS_FILE)
        ]
    return b"".join(parts)
