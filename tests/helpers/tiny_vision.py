"""Tiny random vision-language models with their processors, as folders: from transformers' configs.

Of two families: llava (an image is a fixed number of tokens) and idefics3 (an image is cut into tiles).
"""

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

WORDS = (
    "a", "b", "c", "d", "e", "f", "g", "h", "what", "is", "in", "this", "picture", "it", "shows", "red",
    "blue", "green", "and", "two", "three",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENS = {
    "llava": ("<image>",),
    "idefics3": (
        "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
        *(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)), "\n", "\n\n",
    ),
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = tuple(TOKENS)


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", *TOKENS[family]]
    vocabulary = {word: idx for idx, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        chat_template=CHAT_TEMPLATE, model_max_length=512,
    )  # fmt: skip


def make_vision(folder: Path, family: str = "llava", seed: int = 0) -> Path:
    """Write a model of about 60 thousand parameters and its processor."""
    set_seed(seed)
    tokenizer = make_tokenizer(family)
    model, processor = MAKERS[family](tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(str(folder))
    return folder


def _model(model_type: str, tokenizer: PreTrainedTokenizerFast, **entries: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **entries)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.float()


def _llava(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, Any]:
    sizes = {"height": 24, "width": 24}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=sizes)
    template = tokenizer.chat_template
    processor = LlavaProcessor(image_processor, tokenizer, 8, "default", template, "<image>", 1)
    model = _model(
        "llava",
        tokenizer,
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "image_size": 24,
            "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16,
            "initializer_range": 0.2, "initializer_factor": 5.0,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )  # fmt: skip
    return model, processor


def _idefics3(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, Any]:
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    processor = Idefics3Processor(
        image_processor, tokenizer, image_seq_len=1, chat_template=tokenizer.chat_template
    )
    model = _model(
        "idefics3",
        tokenizer,
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "image_size": 16, "patch_size": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return model, processor


MAKERS = {"llava": _llava, "idefics3": _idefics3}


def picture(seed: int, width: int = 30, height: int = 20) -> PIL.Image.Image:
    """A picture of two random halves."""
    draw = random.Random(seed)
    colours = [tuple(draw.randrange(256) for _ in range(3)) for _ in range(2)]
    image = PIL.Image.new("RGB", (width, height), colours[0])
    image.paste(colours[1], (width // 2, 0, width, height))
    return image


def png(seed: int, width: int = 30, height: int = 20) -> bytes:
    stream = io.BytesIO()
    picture(seed, width, height).save(stream, format="PNG")
    return stream.getvalue()


def rows_with_images(folder: Path, num: int, images_a_row: Sequence[int] = (1,)) -> list[dict[str, Any]]:
    """Rows in TRL's format with the images as files of `folder`."""
    draw = random.Random(0)
    rows = []
    for row in range(num):
        names = []
        for place in range(images_a_row[row % len(images_a_row)]):
            name = f"{row}-{place}.png"
            sizes = draw.choice([(30, 20), (24, 24), (16, 40)])
            (folder / name).write_bytes(png(100 * row + place, *sizes))
            names.append(name)
        question = "what is in this picture " + draw.choice("abcdefgh")
        parts: list[dict[str, str]] = [{"type": "image"} for _ in names]
        answers = [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(2)]
        rows.append(
            {
                "images": names,
                "prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
                "chosen": [{"role": "assistant", "content": "it shows " + answers[0]}],
                "rejected": [{"role": "assistant", "content": "it is " + answers[1]}],
            }
        )
    return rows
