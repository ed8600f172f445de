"""An adapter and its base model as one whole model, by peft's own merge: for `rcpo export --merge`, and where
the run of an adapter is evaluated.

Owns nothing of training: `rcpo.models.adapters` merges what a run saves as merged. The sum W + scaling * B A
is rounded once to the dtype that the run trained in.
"""

import dataclasses
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from rcpo.common.errors import UserError
from rcpo.config.schema import LoraConfig, ModelConfig
from rcpo.models.adapters import refuse_shared
from rcpo.models.load import load_frozen_model, one_line_errors


def merged_model(folder: str, config: ModelConfig) -> PreTrainedModel:
    """The model that the adapter in `folder` makes of the base in `config.path`, without gradients. Raises
    UserError where the base cannot be loaded or the adapter cannot be merged into it.

    An adapter that was trained on 4-bit weights is merged into those that they were made of.
    """
    import peft

    base = load_frozen_model(dataclasses.replace(config, lora=LoraConfig(), quantization=None))
    with one_line_errors(config.path, "adapter"):
        adapted = peft.PeftModel.from_pretrained(base, folder)
    refuse_shared(adapted, "export it without --merge")
    try:
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # its check for numbers that are not finite
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: cannot be merged ({said}); export it without --merge") from None
    return merged.eval()


def write_merged(folder: Path, config: ModelConfig, out: Path) -> None:
    """`merged_model` as a model folder `out`, with the tokenizer of `folder`."""
    merged_model(str(folder), config).save_pretrained(out)
    for file in folder.iterdir():
        if not file.name.startswith("adapter_") and file.name != "README.md":
            shutil.copy2(file, out)
