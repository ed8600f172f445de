"""The policy: a Hugging Face causal language model read as a function from pairs to summed log-probabilities.

Owns loading (folder, hub id or the model that ships with rcpo), the checks on what was loaded, and the
forward pass that never makes full logits. Does not own training: `rcpo.engine` wraps it.
"""

import contextlib
import io
import logging
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
from rcpo.logprobs import TokenLogProbHead, sum_per_row

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

    def forward(self, batch: PairBatch) -> Tensor:
        """z (2B,) fp32: rows 0..B-1 chosen, B..2B-1 rejected.

        Rows are padded on the right, so causal attention keeps padding out of every real position without a
        mask.
        """
        body = self.model.get_decoder()
        hidden = body(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return sum_per_row(self.head(hidden, batch), batch)


def _output_projection(model: PreTrainedModel) -> nn.Linear:
    """The linear output head; UserError where logits are not a plain affine map of the last hidden state."""
    name = type(model).__name__
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"model.path: {name} has {type(head).__name__} as its output head; rcpo needs a linear one"
        )
    for key, neutral in SCALED_LOGITS.items():
        value = getattr(model.config, key, neutral)
        if value is not None and value != neutral:
            raise UserError(
                f"model.path: {name} transforms its logits ({key}={value}), which rcpo does not do yet"
            )
    return head


def model_source(path: str) -> str:
    """What transformers is asked to load: the packaged folder for builtin:tiny, else `path` itself.

    Raises UserError where a local folder lacks what a model needs.
    """
    if path == TINY:
        return str(Path(rcpo.builtin.__file__).parent / "tiny")
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"model.path={path}: is a file; it must be a folder with config.json and weights")
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise UserError(
                f"model.path={path}: no such folder; give a model folder, a hub id or builtin:tiny"
            )
        return path
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={path}: has no config.json, so it is not a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        pickled = (
            "; it has pickled weights only, convert them to safetensors" if any(folder.glob("*.bin")) else ""
        )
        raise UserError(f"model.path={path}: has no *.safetensors weights{pickled}")
    return path


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the chat template that `config` asks for."""
    source = model_source(config.path)
    with _one_line_errors(config.path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    apply_chat_template_choice(tokenizer, config.chat_template)
    return tokenizer


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The causal language model in its training dtype, without dropout.

    Dropout is off, so that the policy equals its reference at step 0 and a step has no randomness of its own
    (`model.lora.dropout` is the exception that a user asks for; it acts in training passes alone). With
    `model.lora` everything but the new adapter is frozen. Collective at ZeRO 3.
    """
    source = model_source(config.path)
    transformers_logging.disable_progress_bar()
    with _one_line_errors(config.path, "model"):
        hf_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        for key in vars(hf_config):
            if key.endswith(("dropout", "_pdrop")) and isinstance(getattr(hf_config, key), float):
                setattr(hf_config, key, 0.0)
        options: dict[str, Any] = (
            {} if config.attention is None else {"attn_implementation": config.attention}
        )
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=hf_config,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            **options,
            **quantization_options(config),
        )
    add_adapters(model, config, source)
    trainable, total = count_parameters(model)
    logger.info("trainable parameters: %d of %d (%.2f %%)", trainable, total, 100 * trainable / total)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError when the tokenizer has ids that the model has no row for; reads config.json alone."""
    rows = getattr(_text_config(config), "vocab_size", None)
    if rows is not None and len(tokenizer) > rows:
        raise UserError(
            f"model.path={config.path}: the tokenizer has {len(tokenizer)} tokens, the model only {rows}; "
            "use the tokenizer that belongs to the model"
        )


def check_positions(config: ModelConfig, longest: int) -> None:
    """Raise UserError when a row of `longest` tokens is longer than the model's positions go."""
    positions = getattr(_text_config(config), "max_position_embeddings", None)
    if isinstance(positions, int) and longest > positions:
        raise UserError(
            f"train.max_length: the longest row has {longest} tokens, model.path={config.path} takes "
            f"{positions}; type train.max_length={positions}"
        )


def _text_config(config: ModelConfig) -> PretrainedConfig:
    with _one_line_errors(config.path, "config"):
        return AutoConfig.from_pretrained(
            model_source(config.path), trust_remote_code=config.trust_remote_code
        ).get_text_config()


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
def _one_line_errors(path: str, what: str) -> Any:
    """Turn what transformers raises for a bad folder or an unreachable hub into a UserError; keep its chatter
    quiet."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = next(
                (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
            )
            raise UserError(f"model.path={path}: the {what} cannot be loaded: {first[:300]}") from error
