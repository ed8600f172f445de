"""Processors of families that take videos too, without the part for videos.

transformers 5.24 builds none of them without torchvision, which that part alone needs: images have a part on
Pillow. So the processor is made of its parts. What is written into a model folder are the files that the
processor came from, videos and all.
"""

import inspect
import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, PreTrainedTokenizerBase
from transformers.utils import cached_file

FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a processor is read from, beside the tokenizer's files."""


def has_processor(folder: Path) -> bool:
    """Whether a model folder is of a model that sees."""
    return any((folder / name).is_file() for name in FILES[:2])


def without_videos(kind: str, place: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The processor of the class `kind` from the folder or hub id `place`, for images and text."""
    known = getattr(transformers, kind)
    entries, _ = known.get_processor_dict(place)
    parts = known.get_attributes()
    own = {
        name: entries[name]
        for name in inspect.signature(known.__init__).parameters
        if name in entries and name not in (*parts, "self", "chat_template", "kwargs")
    }

    def save_pretrained(self: Any, folder: str) -> None:
        for name in FILES:
            found = cached_file(place, name, _raise_exceptions_for_missing_entries=False)
            target = Path(folder) / name
            if found is not None and not (target.exists() and target.samefile(found)):
                shutil.copyfile(found, target)

    made = type(
        kind,
        (known,),
        {
            "check_argument_for_proper_class": lambda self, name, part: None,
            "save_pretrained": save_pretrained,
        },
    )
    return made(
        image_processor=AutoImageProcessor.from_pretrained(place, backend="pil"),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=entries.get("chat_template", tokenizer.chat_template),
        **own,
    )
