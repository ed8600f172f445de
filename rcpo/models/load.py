"""Loading a Hugging Face causal language model and its tokenizer: a folder, a hub id or the model that ships
with rcpo.

Owns what transformers is asked for and how its faults are told. Does not own the forward pass
(`rcpo.models.policy`), the checks of what was loaded (`rcpo.models.checks`) or training
(`rcpo.engine.engine`)."""

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import rcpo.builtin
from rcpo.common.errors import UserError
from rcpo.config.names import BUILTIN, last_part
from rcpo.config.schema import ModelConfig
from rcpo.data.generation import Generation, set_generation
from rcpo.data.pictures import sight_of
from rcpo.data.template import apply_chat_template_choice
from rcpo.models.adapter_files import refuse_adapter
from rcpo.models.adapters import (
    add_adapters,
    hold_layout,
    quantization_options,
    save_adapter,
    saves_adapter,
)
from rcpo.models.attention import leave_masks_unread, transformers_name
from rcpo.models.generation import end_ids
from rcpo.models.hub import hub_folder, is_hub_id
from rcpo.models.places import check_config_file, refuse_no_place
from rcpo.models.sizes import count_parameters
from rcpo.models.vision import (
    check_vision,
    freeze_vision,
    give_sight,
    has_vision,
    hold_names,
    is_given_sight,
    is_vision,
    reads_images,
)

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


def model_place(
    path: str, allow_pickle: bool = False, needs_weights: bool = True, revision: str | None = None
) -> str:
    """The folder that transformers is asked to load: the packaged one for builtin:NAME, that of a commit of
    the hub (`rcpo.models.hub`), else `path` itself.

    Raises UserError where a folder lacks what a model needs; pickled weights count with `allow_pickle`.
    """
    if path in BUILTIN:
        return str(Path(rcpo.builtin.__file__).parent / last_part(path))
    refuse_no_place(path)
    folder = Path(path)
    if revision is not None and not is_hub_id(path):
        raise UserError(
            f"model.revision={revision}: {path} is a folder, which has one state alone; type "
            "model.revision=null"
        )
    if is_hub_id(path):
        folder = hub_folder(path, revision, needs_weights, allow_pickle)
    place = str(folder)
    refuse_adapter(path, place)
    check_config_file(folder, path)
    if not needs_weights or any(folder.glob("*.safetensors")):
        return place
    if not any(folder.glob("*.bin")):
        raise UserError(f"model.path={path}: has no *.safetensors weights; give the folder of a whole model")
    if not allow_pickle:
        raise UserError(
            f"model.path={path}: has no *.safetensors weights, only pickled ones; convert them, or type "
            "model.allow_pickle=true to load tensors, and nothing but tensors, from them"
        )
    return place


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the chat template that `config` asks for, and with what ends a response.
    Needs no weights."""
    place = model_place(config.path, config.allow_pickle, needs_weights=False, revision=config.revision)
    with one_line_errors(config.path, "tokenizer"), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=config.trust_remote_code)
        ends = end_ids(place)
    set_generation(tokenizer, Generation(ends, config.response))
    hf_config = read_config(config)
    if reads_images(hf_config):
        check_vision(config, hf_config)
    if is_given_sight(place, config, hf_config):
        with one_line_errors(config.path, "processor"), quiet_transformers():
            give_sight(tokenizer, place, config, hf_config)
    apply_chat_template_choice(tokenizer, config.chat_template)
    return tokenizer


def load_model(config: ModelConfig, device: torch.device = CPU) -> PreTrainedModel:
    """The causal language model in its training dtype, without dropout; on the CPU, or with
    `model.quantization` on `device`.

    Dropout is off, so that the policy equals its reference at step 0 and a step has no randomness of its own
    (`model.lora.dropout` is the exception that a user asks for; it acts in training passes alone). With
    `model.lora` everything but the new adapter is frozen. Collective at ZeRO 3.
    """
    place = model_place(config.path, config.allow_pickle, revision=config.revision)
    with one_line_errors(config.path, "model"):
        model = from_pretrained(place, config, **quantization_options(config, device))
    hold_layout(model)
    if has_vision(model):
        freeze_vision(model, config.vision)
    add_adapters(model, config, place)
    trainable, total = count_parameters(model)
    logger.info("trainable parameters: %d of %d (%.2f %%)", trainable, total, 100 * trainable / total)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


RANDOM = ("dropout", "pdrop", "jitter_noise", "jitter_eps", "layerdrop", "drop_path")
"""In the names of config entries that make a training pass random; 0 turns each of them off."""


def _without_randomness(hf_config: PretrainedConfig) -> None:
    """Turn off what a training pass draws, in nested configs too; that nothing is left,
    `rcpo.training.agreement` checks."""
    for key, value in vars(hf_config).items():
        if isinstance(value, PretrainedConfig):
            _without_randomness(value)
            continue
        is_threshold = (hf_config.model_type, key) in THRESHOLDS
        if isinstance(value, float) and any(part in key for part in RANDOM) and not is_threshold:
            setattr(hf_config, key, 0.0)
        elif key == "rescale_every":  # RWKV: an evaluation would divide the weights that train
            setattr(hf_config, key, 0)


THRESHOLDS = {("phimoe", "router_jitter_noise")}
"""Entries with such a name that evaluation reads too: without it PhiMoE would be another model."""


def _hold_routers_still(model: PreTrainedModel) -> None:
    """Routers that draw their experts in a training pass choose them there as in evaluation."""
    for module in model.modules():
        if hasattr(module, "router_jitter_noise"):
            module.eval()
            module.train = lambda mode=True, self=module: self


def load_frozen_model(config: ModelConfig) -> PreTrainedModel:
    """A model that gives log-probabilities and never trains. Collective at ZeRO 3."""
    with one_line_errors(config.path, "model"):
        place = model_place(config.path, config.allow_pickle, revision=config.revision)
        model: PreTrainedModel = from_pretrained(place, config)
    model.requires_grad_(False)
    return model.eval()


def from_pretrained(place: str, config: ModelConfig, **options: Any) -> Any:
    """What transformers makes of the weights, without dropout; `options` are further ones of its own."""
    transformers_logging.disable_progress_bar()
    hf_config = AutoConfig.from_pretrained(place, trust_remote_code=config.trust_remote_code)
    _without_randomness(hf_config)
    if config.attention is not None:
        options["attn_implementation"] = transformers_name(config.attention)
    use_safetensors: bool | None = True
    if config.allow_pickle:  # a folder that has both is read as safetensors; of a hub id it is not known
        use_safetensors = any(Path(place).glob("*.safetensors")) if Path(place).is_dir() else None
    sees = is_vision(hf_config)
    loaded = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(
        place,
        config=hf_config,
        dtype=getattr(torch, config.dtype),
        use_safetensors=use_safetensors,
        trust_remote_code=config.trust_remote_code,
        **options,
    )
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    _hold_routers_still(model)
    if reads_images(hf_config):
        hold_names(model)
    if not sees:  # a tower's masks are its own
        leave_masks_unread(model)
    return loaded


def read_config(config: ModelConfig) -> PretrainedConfig:
    with one_line_errors(config.path, "config"), quiet_transformers():
        place = model_place(config.path, config.allow_pickle, needs_weights=False, revision=config.revision)
        return AutoConfig.from_pretrained(place, trust_remote_code=config.trust_remote_code)


def save_model(
    model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write a Hugging Face model folder: safetensors (tied weights once), config, tokenizer with its
    template; for `model.lora.save=adapter` peft's adapter instead, which `from_pretrained` loads likewise."""
    with contextlib.redirect_stdout(io.StringIO()):
        if saves_adapter(model):
            save_adapter(model, weights, folder)
        else:
            model.save_pretrained(folder, state_dict=weights)
    save_tokenizer(tokenizer, folder)


OF_LOADING = ("is_local", "local_files_only", "name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Entries of tokenizer_config.json that say how and where it was loaded on this machine."""


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer with its template, and nothing of where it came from."""
    tokenizer.save_pretrained(folder)
    if (sight := sight_of(tokenizer)) is not None:
        sight.processor.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    entries = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in entries.items() if key not in OF_LOADING}
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' tables of what was loaded, which rcpo says in its own words."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU, or as the CPU's allocator says it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


@contextlib.contextmanager
def one_line_errors(path: str, what: str) -> Iterator[None]:
    """Turn whatever transformers raises for a bad folder or an unreachable hub into a UserError; keep its
    chatter quiet. Running out of memory is no fault of the folder."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        except UserError:
            raise
        # Of a broken folder each library in turn raises a class of its own.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"model.path={path}: its {what} is Python code of its own, not one that transformers "
                    "knows; type model.trust_remote_code=true to run that code, which may then do here "
                    "whatever you may do, so read it first"
                ) from error
            lines = (line.strip().rstrip(":") for line in str(error).splitlines())
            first = next((line for line in lines if line), type(error).__name__)
            raise UserError(
                f"model.path={path}: the {what} cannot be loaded: {first[:300]}; give the folder or hub id "
                "of a whole model, with config.json, weights and tokenizer"
            ) from error
