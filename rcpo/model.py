"""The policy: a Hugging Face causal language model read as a function from pairs to summed log-probabilities.

Owns loading (folder, hub id or the model that ships with rcpo), the checks on what was loaded, and the
forward pass that never makes full logits. Does not own training: `rcpo.engine` wraps it.
"""

import contextlib
import dataclasses
import inspect
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

import rcpo.builtin
from rcpo.adapters import (
    add_adapters,
    count_parameters,
    quantization_options,
    save_adapter,
    saves_adapter,
)
from rcpo.config.resolve import TINY
from rcpo.config.schema import ModelConfig
from rcpo.data.batch import PairBatch
from rcpo.data.render import apply_chat_template_choice
from rcpo.errors import UserError
from rcpo.logprobs import TokenLogProbHead, importance_weighted, sum_per_side

logger = logging.getLogger(__name__)

SCALED_LOGITS = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "output_multiplier": 1.0,
}
"""Config entries that transform logits after the output projection, with the value that means "no"."""


class Policy(nn.Module):
    """A causal language model and its log-prob head: `policy(batch)` is z, summed log-probs (2B,) fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.head = TokenLogProbHead(_output_projection(model))

    def forward(self, batch: PairBatch, tokens: bool = False) -> Tensor:
        """z (2B,) fp32: 0..B-1 chosen, B..2B-1 rejected; with `tokens` the token log-probs (N,). Where the
        batch has the reference's, z is weighted by importance.

        Rows are padded on the right, so causal attention keeps padding out of every real position without a
        mask; a joint layout needs one.
        """
        body = self.model.get_decoder()
        joint: dict[str, Tensor | None] = {}
        if batch.segments is not None:
            mask = self._attention_mask(batch.segments)
            joint = {"attention_mask": mask, "position_ids": batch.position_ids}
        hidden = body(input_ids=batch.input_ids, use_cache=False, **joint).last_hidden_state
        logps: Tensor = self.head(hidden, batch)
        if tokens:
            return logps
        if batch.ref_logps is None:
            return sum_per_side(logps, batch)
        z, omega = importance_weighted(logps, batch.ref_logps, batch)
        if self.head.scores is not None:
            self.head.scores.importance = omega
        return z

    def _attention_mask(self, segments: Tensor) -> Tensor | None:
        """(R, 1, T, T): who sees whom, as bool for sdpa and as what is added to the scores for eager. flash
        attention takes none: it reads off the positions where a packed sequence begins."""
        kernel = self.model.config._attn_implementation
        if kernel == "flash_attention_2":
            return None
        key, query = segments[:, None, :], segments[:, :, None]
        seen = (key == query) | ((key % 3 == 0) & (key // 3 == query // 3))
        seen = seen.tril().unsqueeze(1)
        if kernel == "sdpa":
            return seen
        dtype = self.model.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def refuse_joint_layout(model: PreTrainedModel, share_prefix: bool) -> None:
    """Raise UserError where a prompt cannot be computed once for both responses, or sequences cannot share a
    row: attention without masks, positions that are not given, or windows that a mask of one's own would do
    away with."""
    name = type(model).__name__
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    takes = inspect.signature(model.get_decoder().forward).parameters
    kernel = model.config._attn_implementation
    why = None
    if kernel not in ("sdpa", "eager") and (share_prefix or kernel != "flash_attention_2"):
        why = f"{kernel} takes no mask; type model.attention=sdpa"
    elif kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        why = "it attends within windows"
    elif not {"position_ids", "attention_mask"} <= set(takes):
        why = "it takes no position_ids"
    if why is not None:
        key, what = (
            ("share_prefix", "compute a prompt once for both responses")
            if share_prefix
            else ("packing", "have several sequences on a row")
        )
        raise UserError(f"train.{key}=true: {name} cannot {what}: {why}; or type train.{key}=false")


def _output_projection(model: PreTrainedModel) -> nn.Linear:
    """The linear output head; UserError where logits are not a plain affine map of the last hidden state."""
    name = type(model).__name__
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"model.path: {name} has {type(head).__name__} as its output head; give a model with a linear one"
        )
    for key, neutral in SCALED_LOGITS.items():
        value = getattr(model.config, key, neutral)
        if value is not None and value != neutral:
            raise UserError(
                f"model.path: {name} transforms its logits ({key}={value}), which rcpo does not do; "
                "give another model"
            )
    return head


def model_source(path: str, allow_pickle: bool = False) -> str:
    """What transformers is asked to load: the packaged folder for builtin:tiny, else `path` itself.

    Raises UserError where a local folder lacks what a model needs; pickled weights count with `allow_pickle`.
    """
    if path == TINY:
        return str(Path(rcpo.builtin.__file__).parent / "tiny")
    folder = Path(path)
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise UserError(f"model.path={path}: is a file; it must be a folder with config.json and weights")
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise UserError(
                f"model.path={path[:200]}: no such folder; give a model folder, a hub id or builtin:tiny"
            )
        return path
    _check_config_file(folder, path)
    if any(folder.glob("*.safetensors")):
        return path
    if not any(folder.glob("*.bin")):
        raise UserError(f"model.path={path}: has no *.safetensors weights; give the folder of a whole model")
    if not allow_pickle:
        raise UserError(
            f"model.path={path}: has no *.safetensors weights, only pickled ones; convert them, or type "
            "model.allow_pickle=true to load tensors, and nothing but tensors, from them"
        )
    return path


def _check_config_file(folder: Path, path: str) -> None:
    """Raise UserError where config.json is missing or no JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model.path={path}: has no config.json, so it is no model folder; give another")
    try:
        is_object = isinstance(json.loads(file.read_bytes()), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise UserError(f"model.path={path}: its config.json is not a JSON object; copy the model again")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the chat template that `config` asks for."""
    source = model_source(config.path, config.allow_pickle)
    with _one_line_errors(config.path, "tokenizer"), _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    apply_chat_template_choice(tokenizer, config.chat_template)
    return tokenizer


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The causal language model in its training dtype, without dropout.

    Dropout is off, so that the policy equals its reference at step 0 and a step has no randomness of its own
    (`model.lora.dropout` is the exception that a user asks for; it acts in training passes alone). With
    `model.lora` everything but the new adapter is frozen. Collective at ZeRO 3.
    """
    source = model_source(config.path, config.allow_pickle)
    with _one_line_errors(config.path, "model"):
        model = _from_pretrained(source, config, **quantization_options(config))
    add_adapters(model, config, source)
    trainable, total = count_parameters(model)
    logger.info("trainable parameters: %d of %d (%.2f %%)", trainable, total, 100 * trainable / total)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_frozen_model(config: ModelConfig) -> PreTrainedModel:
    """A model that gives log-probabilities and never trains. Collective at ZeRO 3."""
    with _one_line_errors(config.path, "model"):
        source = model_source(config.path, config.allow_pickle)
        model: PreTrainedModel = _from_pretrained(source, config)
    model.requires_grad_(False)
    return model.eval()


def _from_pretrained(source: str, config: ModelConfig, **options: Any) -> Any:
    """What transformers makes of the weights, without dropout; `options` are further ones of its own."""
    transformers_logging.disable_progress_bar()
    hf_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    for key in vars(hf_config):
        if key.endswith(("dropout", "_pdrop")) and isinstance(getattr(hf_config, key), float):
            setattr(hf_config, key, 0.0)
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    use_safetensors: bool | None = True
    if config.allow_pickle:  # a folder that has both is read as safetensors; of a hub id it is not known
        use_safetensors = any(Path(source).glob("*.safetensors")) if Path(source).is_dir() else None
    return AutoModelForCausalLM.from_pretrained(
        source,
        config=hf_config,
        dtype=getattr(torch, config.dtype),
        use_safetensors=use_safetensors,
        trust_remote_code=config.trust_remote_code,
        **options,
    )


def check_model(config: ModelConfig) -> None:
    """Raise UserError for a model that cannot be trained as configured: not a causal language model, weights
    that are missing or of other shapes (transformers would go on with random ones), an output head or an
    adapter that rcpo cannot use. Reads names and shapes; holds no weights in memory."""
    source = model_source(config.path, config.allow_pickle)
    _check_architecture(config)
    with _one_line_errors(config.path, "model"), _quiet_transformers():
        model, loading = _from_pretrained(
            source, config, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    missing = sorted({str(name) for name in loading["missing_keys"]})
    other_shapes = sorted({str(entry[0]) for entry in loading["mismatched_keys"]})
    for names, fault in ((missing, "lack"), (other_shapes, "have another shape for")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"model.path={config.path}: its weights {fault} {names[0]}{more} of "
                f"{type(model).__name__}; give weights and config.json of one and the same model"
            )
    Policy(model)
    if config.lora.rank is not None:
        lora = dataclasses.replace(config.lora, save="merged")
        if lora.adapter is not None:
            lora = dataclasses.replace(lora, on_adapter="stack")  # to merge, there would have to be weights
        with torch.device("meta"):
            add_adapters(model, dataclasses.replace(config, lora=lora), source)


CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def _check_architecture(config: ModelConfig) -> None:
    """By what config.json says of itself: an encoder loads as a language model, and trains to nonsense."""
    hf_config = _read_config(config)
    kind = str(next(iter(getattr(hf_config, "architectures", None) or ()), ""))
    is_causal = kind in ("", *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) or kind.endswith(CAUSAL_ENDINGS)
    if not is_causal or getattr(hf_config, "is_encoder_decoder", False):
        raise UserError(
            f"model.path={config.path}: is {kind or hf_config.model_type}, not a causal language model; "
            "give a model that continues text, such as a ...ForCausalLM"
        )


def check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError when the tokenizer has ids that the model has no row for; reads config.json alone."""
    rows = getattr(_read_config(config).get_text_config(), "vocab_size", None)
    if rows is not None and len(tokenizer) > rows:
        raise UserError(
            f"model.path={config.path}: the tokenizer has {len(tokenizer)} tokens, the model only {rows}; "
            "use the tokenizer that belongs to the model"
        )


def check_positions(config: ModelConfig, longest: int) -> None:
    """Raise UserError when a row of `longest` tokens is longer than the model's positions go."""
    positions = getattr(_read_config(config).get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and longest > positions:
        raise UserError(
            f"train.max_length: the longest row has {longest} tokens, model.path={config.path} takes "
            f"{positions}; type train.max_length={positions}"
        )


def _read_config(config: ModelConfig) -> PretrainedConfig:
    with _one_line_errors(config.path, "config"), _quiet_transformers():
        return AutoConfig.from_pretrained(
            model_source(config.path, config.allow_pickle), trust_remote_code=config.trust_remote_code
        )


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
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' tables of what was loaded, which rcpo says in its own words."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextlib.contextmanager
def _one_line_errors(path: str, what: str) -> Iterator[None]:
    """Turn whatever transformers raises for a bad folder or an unreachable hub into a UserError; keep its
    chatter quiet. Running out of memory is no fault of the folder."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        # Of a broken folder each library in turn raises a class of its own.
        except Exception as error:
            lines = (line.strip().rstrip(":") for line in str(error).splitlines())
            first = next((line for line in lines if line), type(error).__name__)
            raise UserError(
                f"model.path={path}: the {what} cannot be loaded: {first[:300]}; give the folder or hub id "
                "of a whole model, with config.json, weights and tokenizer"
            ) from error
