"""What is checked of a model before a run folder exists, from its config and the shapes of its weights."""

import dataclasses

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rcpo.common.errors import UserError
from rcpo.config.schema import ModelConfig
from rcpo.models.adapter_files import refuse_adapter
from rcpo.models.adapters import add_adapters
from rcpo.models.load import from_pretrained, model_place, one_line_errors, quiet_transformers, read_config
from rcpo.models.policy import Policy
from rcpo.models.router import check_router
from rcpo.models.vision import check_vision, freeze_vision, has_vision, is_vision


def check_model(config: ModelConfig) -> None:
    """Raise UserError for a model that cannot be trained as configured: not a causal language model, weights
    that are missing or of other shapes (transformers would go on with random ones), an output head or an
    adapter that rcpo cannot use. Reads names and shapes; holds no weights in memory."""
    place = model_place(config.path, config.allow_pickle, revision=config.revision)
    with one_line_errors(config.path, "model"):
        refuse_adapter(config.path, place)
    _check_architecture(config)
    with one_line_errors(config.path, "model"), quiet_transformers():
        model, loading = from_pretrained(
            place, config, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
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
    check_router(model, config.router_loss)
    _adapt_on_meta(model, config, place)


def shapes_of(config: ModelConfig) -> PreTrainedModel:
    """The model that will train, on the meta device: shapes alone. `check_model` has passed."""
    place = model_place(config.path, config.allow_pickle)
    with one_line_errors(config.path, "model"), quiet_transformers():
        model: PreTrainedModel = from_pretrained(place, config, device_map="meta")
    _adapt_on_meta(model, config, place)
    return model


def _adapt_on_meta(model: PreTrainedModel, config: ModelConfig, place: str) -> None:
    if has_vision(model):
        freeze_vision(model, config.vision)
    if config.lora.rank is None:
        return
    lora = config.lora
    if lora.adapter is not None:
        lora = dataclasses.replace(lora, on_adapter="stack")  # to merge, there would have to be weights
    with torch.device("meta"):
        add_adapters(model, dataclasses.replace(config, lora=lora), place)


CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def _check_architecture(config: ModelConfig) -> None:
    """By what config.json says of itself: an encoder loads as a language model, and trains to nonsense."""
    hf_config = read_config(config)
    check_vision(config, hf_config)
    if is_vision(hf_config):
        return
    kind = str(next(iter(getattr(hf_config, "architectures", None) or ()), ""))
    is_causal = kind in ("", *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) or kind.endswith(CAUSAL_ENDINGS)
    if not is_causal or getattr(hf_config, "is_encoder_decoder", False):
        raise UserError(
            f"model.path={config.path}: is {kind or hf_config.model_type}, not a causal language model; "
            "give a model that continues text, such as a ...ForCausalLM"
        )


def check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError when the tokenizer has ids that the model has no row for; reads config.json alone."""
    rows = getattr(read_config(config).get_text_config(), "vocab_size", None)
    if rows is not None and len(tokenizer) > rows:
        raise UserError(
            f"model.path={config.path}: the tokenizer has {len(tokenizer)} tokens, the model only {rows}; "
            "use the tokenizer that belongs to the model"
        )


def check_positions(config: ModelConfig, longest: int) -> None:
    """Raise UserError when a row of `longest` tokens is longer than the model's positions go."""
    positions = getattr(read_config(config).get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and longest > positions:
        raise UserError(
            f"train.max_length: the longest row has {longest} tokens, model.path={config.path} takes "
            f"{positions}; type train.max_length={positions}"
        )
