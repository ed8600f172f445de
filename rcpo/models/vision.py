"""Vision-language models: which families are known, their processor, and the pass in which an image is
encoded once for both sides of its pair.

transformers' bodies take what their vision tower made of the images, as `mm_encoder_outputs`: it is made of
the B pairs' images, and stands twice in what the 2B rows are given. So the tower runs on B images, forward
and back. What follows, from the text decoder on, is that of any language model: the head, the scores and the
calibration know no images.

Does not own reading images (`rcpo.data.pictures`) or loading weights (`rcpo.models.load`, which calls this).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import WeightConverter
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from rcpo.common.errors import UserError
from rcpo.config.evaluation import ASKS_TEXT
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.schema import ModelConfig
from rcpo.data.batch import PairBatch
from rcpo.data.pictures import Pixels, Processor, Sight, set_sight
from rcpo.models.processors import has_processor, without_videos
from rcpo.models.sights import FAMILIES, Family, features_of, repeat_features


def is_vision(hf_config: PretrainedConfig) -> bool:
    """Whether config.json is of a model that transformers loads for images and text, and for nothing else."""
    kind = str(next(iter(getattr(hf_config, "architectures", None) or ()), ""))
    return (
        kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
        and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )


def reads_images(hf_config: PretrainedConfig) -> bool:
    """Whether config.json is of a model that sees, be it one of text as well (Gemma 3)."""
    return is_vision(hf_config) or hf_config.model_type in FAMILIES


def has_vision(model: PreTrainedModel) -> bool:
    return reads_images(model.config)


def is_given_sight(place: str, config: ModelConfig, hf_config: PretrainedConfig) -> bool:
    """Whether images may be shown to the model in the folder `place`: where it is one of text as well, it has
    to have a processor, and a chat template with a place for them."""
    as_text = config.chat_template == "plain" or not has_processor(Path(place))
    return is_vision(hf_config) or (reads_images(hf_config) and not as_text)


def hold_names(model: PreTrainedModel) -> None:
    """Let weights be saved under the names that they were loaded by. At ZeRO 3 transformers keeps every way
    in which names of this architecture may have been changed, used or not, and would undo them all."""
    known = getattr(model, "_weight_conversions", None)
    if known is not None:
        kept = [each for each in known if each.was_used() or isinstance(each, WeightConverter)]
        model._weight_conversions = kept


def check_vision(config: ModelConfig, hf_config: PretrainedConfig) -> None:
    """Raise UserError for a family that is not known, and for keys that a model cannot have."""
    if not reads_images(hf_config):
        if config.vision != "frozen":
            raise UserError(
                f"model.vision={config.vision}: {config.path} reads text alone; type model.vision=frozen"
            )
        return
    if hf_config.model_type not in FAMILIES:
        raise UserError(
            f"model.path={config.path}: is a vision-language model of the family {hf_config.model_type}, "
            f"which rcpo does not know; those that it knows are {', '.join(FAMILIES)}"
        )
    if config.lora.rank is not None and config.vision not in ("frozen", "lora"):
        raise UserError(
            f"model.vision={config.vision}: where adapters train, no whole part does; type model.vision=lora "
            "for adapters on what sees too, model.vision=frozen, or model.lora.rank=null"
        )
    if FAMILIES[hf_config.model_type].for_text_too:
        return
    if config.quantization is not None:
        raise UserError("model.quantization=4bit: is not there for models that see; type null")
    if config.chat_template == "plain":
        raise UserError(
            "model.chat_template=plain: has no place for images; type null, or a jinja file that has"
        )


def check_run_with_images(config: ResolvedConfig, sight: Sight) -> None:
    """Raise UserError where a run of a model that sees asks for what is not there for it yet."""
    train, key = config.train, None
    if train.share_prefix and sight.why_apart is not None:
        key, advice = "train.share_prefix=true", f"{sight.why_apart}; type train.share_prefix=false"
    elif train.packing and not train.share_prefix:
        key = "train.packing=true"
        advice = "images are packed with their prompts once alone; add train.share_prefix=true"
    elif sight.for_text_too and config.model.quantization is not None:
        key, advice = "model.quantization=4bit", "is not there for images; type model.quantization=null"
    elif not sight.masks and config.model.attention not in (None, "eager", "sdpa"):
        key = f"model.attention={config.model.attention}"
        advice = "has no mask in which the tokens of an image see each other; type model.attention=sdpa"
    elif config.metrics.answers:
        key = f"metrics.answers={config.metrics.answers}"
        advice = "answers to images are not there yet; type metrics.answers=0"
    elif train.evaluate is not None and set(config.evaluation.tasks) & set(ASKS_TEXT):
        key = f"train.evaluate={train.evaluate}"
        advice = "asks text alone; type train.evaluate=yes_no evaluation.questions=FILE, or null"
    elif config.data.unpair:
        key, advice = "data.unpair=true", "images are trained in pairs so far; type data.unpair=false"
    elif config.objective_function.needs_mismatched:
        key = f"objective={config.objective['name']}"
        advice = "its mismatched pairs would show other images; type another objective"
    if key is not None:
        raise UserError(f"{key}: {advice}, or give a model of text alone")


def check_seen(config: ModelConfig, num_with_images: int) -> None:
    """Raise UserError where what sees is to train, and no training pair has an image."""
    if config.vision != "frozen" and not num_with_images:
        raise UserError(
            f"model.vision={config.vision}: no training pair has an image; type model.vision=frozen"
        )


def freeze_vision(model: PreTrainedModel, vision: str) -> None:
    """Let of the parts that see train what `model.vision` says; the language model is left as it is.
    Adapters (lora) are added later, and nothing else trains then."""
    if vision == "train":
        return
    kept = set[int]()
    if vision == "projector":
        names = FAMILIES[model.config.model_type].projector
        projector = map(model.base_model.get_submodule, names)
        kept = {id(parameter) for part in projector for parameter in part.parameters()}
    for parameter in _parameters_of_sight(model):
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def _parameters_of_sight(model: PreTrainedModel) -> list[nn.Parameter]:
    """Of tower and projector: what belongs neither to the language model nor to its head."""
    parts = (cast(nn.Module, model.get_decoder()), model.get_output_embeddings())
    text = {id(parameter) for part in parts for parameter in part.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in text]


def needs_tower(model: PreTrainedModel) -> bool:
    """Whether a pass without images goes through the tower all the same: where what sees trains, and at
    ZeRO 3.

    ZeRO exchanges gradients in the order in which they come, and nothing for a parameter that has none. A
    rank whose micro-batch has no image must have the same gradients in the same order as the others, with
    zeros for what sees. At ZeRO 3 all ranks put the weights of a layer together when one of them comes to it,
    with and without gradients: a rank that does not come there would put together others.
    """
    if not has_vision(model) or hasattr(model, SHOWN_NOTHING):
        return False
    of_sight = _parameters_of_sight(model)
    if any(hasattr(parameter, "ds_id") for parameter in of_sight):
        return True
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in of_sight)


SHOWN_NOTHING = "rcpo_shown_nothing"


def show_nothing(model: PreTrainedModel) -> None:
    """Let no pass go through the tower: of a run without any image, of a model that sees."""
    setattr(model, SHOWN_NOTHING, True)


def give_sight(
    tokenizer: PreTrainedTokenizerBase, place: str, config: ModelConfig, hf_config: PretrainedConfig
) -> None:
    """Let the tokenizer of a model that sees carry the processor, whose chat template it takes. Raises
    UserError where transformers is too old for it."""
    family = FAMILIES[hf_config.model_type]
    if family.with_videos is not None:
        processor = without_videos(family.with_videos, place, tokenizer)
    else:
        processor = AutoProcessor.from_pretrained(
            place, trust_remote_code=config.trust_remote_code, backend="pil"
        )
    if not hasattr(processor, "get_text_with_replacements"):
        raise UserError("images: this transformers is too old for them; pip install 'transformers>=5.24'")
    processor.tokenizer = tokenizer
    if getattr(processor, "chat_template", None):
        tokenizer.chat_template = processor.chat_template
    own = (family.joined_along, family.why_apart, family.for_text_too, family.masks)
    set_sight(tokenizer, Sight(cast(Processor, processor), *own))


def hidden_with_images(model: PreTrainedModel, batch: PairBatch, layout: dict[str, Any]) -> Tensor:
    """Last hidden states (R, T, H) of rows whose prompts show images; of a batch without any, what it would
    be anyway, with an image of nothing encoded and multiplied by zero."""
    body, family = model.base_model, FAMILIES[model.config.model_type]
    if batch.pixels is None:
        device = batch.input_ids.device
        blank = {name: each.to(device) for name, each in family.blank(model.config).items()}
        seen = body.get_image_features(**blank, return_dict=True)
        nothing = sum((each.sum() for each in features_of(seen)), start=torch.zeros((), device=device))
        if hasattr(body, "rope_deltas"):
            body.rope_deltas = None  # those of another batch's images
        with _added_to_embeddings(body, 0 * nothing):
            return cast(Tensor, body(batch.input_ids, use_cache=False, **layout).last_hidden_state)
    seen = body.get_image_features(**batch.pixels.tensors, return_dict=True)
    repeat_features(seen, batch.pixels.num_sides)
    told = family.told(model.config, batch.input_ids, own_pixels(batch.pixels, family))
    given = {"mm_encoder_outputs": {"image": seen}, "use_cache": False, **told, **layout}
    return cast(Tensor, body(batch.input_ids, **given).last_hidden_state)


@contextlib.contextmanager
def _added_to_embeddings(body: nn.Module, nothing: Tensor) -> Iterator[None]:
    """While open, `nothing` () is added to the embeddings of tokens inside `body`: all ranks come to its
    modules in one order, with and without images, as ZeRO 3 wants it."""
    embeddings = cast(Any, body).get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, given, made: made + nothing.to(made.dtype))
    try:
        yield
    finally:
        handle.remove()


def own_pixels(pixels: Pixels, family: Family) -> dict[str, Tensor]:
    """With every row's images by themselves."""
    return {
        name: torch.cat([each] * pixels.num_sides, dim=family.joined_along)
        for name, each in pixels.tensors.items()
    }


def own_inputs(model: PreTrainedModel, input_ids: Tensor, pixels: Pixels | None) -> dict[str, Any]:
    """What the model's own forward method is given beside the ids (R, T): every row's images by
    themselves."""
    if pixels is None:
        return {}
    family = FAMILIES[model.config.model_type]
    tensors = own_pixels(pixels, family)
    return tensors | family.told(model.config, input_ids, tensors)
