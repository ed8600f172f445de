"""Which weights the reference has: the policy's initial ones, or those that `reference.path` names.

Reads config and files alone and loads no model. Called by `rcpo.training.read_inputs` for the checks and by
`rcpo.reference.maker`.
"""

import dataclasses
import re

from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.schema import LoraConfig, ModelConfig
from rcpo.models.adapter_files import refuse_adapter
from rcpo.models.checks import check_model, check_positions, check_vocabulary
from rcpo.models.hub import hub_folder, is_hub_id
from rcpo.models.load import load_tokenizer, one_line_errors
from rcpo.models.places import refuse_no_place


def own_weights(config: ResolvedConfig) -> str | None:
    """The path of the reference's weights, where the objective is given another one than the initial
    policy."""
    return config.reference.path if config.objective_function.needs_reference else None


def has_own_weights(config: ResolvedConfig) -> bool:
    """Whether there is such a path."""
    return own_weights(config) is not None


def reference_model(config: ResolvedConfig) -> ModelConfig:
    """The model whose log-probabilities the objective is given."""
    path = own_weights(config)
    if path is None:
        return config.model
    return without_adapter(dataclasses.replace(config.model, path=path, revision=config.reference.revision))


def without_adapter(model: ModelConfig) -> ModelConfig:
    """The plain model, which never trains."""
    return dataclasses.replace(model, lora=LoraConfig(rank=None, adapter=None), gradient_checkpointing=False)


def check_reference(config: ResolvedConfig, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Raise UserError where the weights that `reference.path` names cannot be the reference of a policy with
    this tokenizer, for rows of up to `longest` tokens; loads no weights."""
    if not has_own_weights(config):
        return
    model, path = reference_model(config), config.reference.path
    try:
        refuse_no_place(model.path)
        place = model.path
        if is_hub_id(place):
            place = str(hub_folder(place, model.revision, needs_weights=False, allow_pickle=False))
        with one_line_errors(model.path, "model"):
            refuse_adapter(model.path, place, key="reference.path")
        check_model(model)
        check_vocabulary(model, tokenizer)
        check_positions(model, longest)
        theirs = load_tokenizer(dataclasses.replace(model, chat_template=None)).get_vocab()
    except UserError as error:
        raise UserError(
            re.sub(
                rf"(?<!\S)model\.(path=(?={re.escape(model.path)})|revision=)", r"reference.\1", str(error)
            )
        ) from None
    others = sorted((idx, word) for word, idx in tokenizer.get_vocab().items() if theirs.get(word) != idx)
    if others:
        idx, word = others[0]
        raise UserError(
            f"reference.path={path}: has another tokenizer than model.path={config.model.path} ({word!r} is "
            f"{theirs.get(word, 'unknown')} there and {idx} here), so it would read other words; give a "
            "reference of the same family, or type reference.path=null"
        )
