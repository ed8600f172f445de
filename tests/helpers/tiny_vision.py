"""Tiny random vision-language models with their processors, as folders: from transformers' configs.

llava (an image is a fixed number of tokens), idefics3, smolvlm and internvl (an image is cut into tiles), and
three of Qwen's (as many tokens as an image is large, and positions of three numbers).
"""

import io
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3Processor,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from rcpo.config.schema import DataConfig, ModelConfig
from rcpo.data.pairs import TokenizedPair
from rcpo.data.tokenize import tokenize_records
from rcpo.models.load import load_tokenizer
from rcpo.records.load import load_records

WORDS = (
    "a", "b", "c", "d", "e", "f", "g", "h", "what", "is", "in", "this", "picture", "it", "shows", "red",
    "blue", "green", "and", "two", "three",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
OF_QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
TOKENS = {
    "llava": ("<image>",),
    "qwen2_vl": OF_QWEN,
    "qwen2_5_vl": OF_QWEN,
    "qwen3_vl": OF_QWEN,
    "internvl": ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
    "gemma3": ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    "idefics3": (
        "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
        *(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)), "\n", "\n\n",
    ),
}  # fmt: skip
TOKENS["smolvlm"] = (*TOKENS["idefics3"], "<video>")
PLACES = {"internvl": "<IMG_CONTEXT>", "gemma3": "<start_of_image>"} | dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|vision_start|><|image_pad|><|vision_end|>"
)
"""What a template writes for an image; <image> of the others."""
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


NAMED = {
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {
        "boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>",
    },
}  # fmt: skip


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", *TOKENS[family]]
    vocabulary = {word: idx for idx, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        chat_template=CHAT_TEMPLATE.replace("<image>", PLACES.get(family, "<image>")), model_max_length=512,
        extra_special_tokens=NAMED.get(family),
    )  # fmt: skip


def make_vision(folder: Path, family: str = "llava", seed: int = 0) -> Path:
    """Write a model of about 60 thousand parameters and its processor."""
    set_seed(seed)
    tokenizer = make_tokenizer(family)
    model, processor = MAKERS[family](tokenizer)
    model.save_pretrained(folder)
    if isinstance(processor, Parts):
        tokenizer.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
        (folder / "processor_config.json").write_text(json.dumps(processor.entries))
    else:
        processor.save_pretrained(str(folder))
    return folder


class Parts(NamedTuple):
    """Of a processor that takes videos too, as which it is published."""

    image_processor: Any
    entries: dict[str, Any]


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
    image_processor = Idefics3ImageProcessorPil(**TILES)
    processor = Idefics3Processor(
        image_processor, tokenizer, image_seq_len=1, chat_template=tokenizer.chat_template
    )
    return _tiled("idefics3", tokenizer), processor


def _smolvlm(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, Any]:
    entries = {"processor_class": "SmolVLMProcessor", "image_seq_len": 1}
    return _tiled("smolvlm", tokenizer), Parts(SmolVLMImageProcessorPil(**TILES), entries)


TILES: dict[str, Any] = {
    "size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}, "do_image_splitting": True,
}  # fmt: skip


def _tiled(model_type: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return _model(
        model_type,
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


def _internvl(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, Any]:
    sizes = {"height": 16, "width": 16}
    image_processor = GotOcr2ImageProcessorPil(size=sizes, crop_to_patches=True, min_patches=1, max_patches=2)
    model = _model(
        "internvl",
        tokenizer,
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **TEXT},
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "image_size": [16, 16], "patch_size": [8, 8],
            "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return model, Parts(image_processor, {"processor_class": "InternVLProcessor", "image_seq_length": 1})


def _qwen(
    model_type: str,
    kind: str,
    vision: dict[str, Any],
    rope: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[PreTrainedModel, Any]:
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 8 * 8, "longest_edge": 24 * 24},
    )  # fmt: skip
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image_token_id": "image_pad", "video_token_id": "video_pad",
            "vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end",
        }.items()
    }  # fmt: skip
    model = _model(
        model_type,
        tokenizer,
        text_config={"vocab_size": len(tokenizer), "rope_parameters": rope, **TEXT},
        vision_config={
            "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "initializer_range": 0.2, **vision,
        },
        tie_word_embeddings=False,
        **ids,
    )  # fmt: skip
    return model, Parts(image_processor, {"processor_class": kind})


def _gemma3(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, Any]:
    sizes = {"height": 16, "width": 16}
    image_processor = Gemma3ImageProcessorPil(size=sizes, image_seq_length=4)
    processor = Gemma3Processor(image_processor, tokenizer, tokenizer.chat_template, image_seq_length=4)
    model = _model(
        "gemma3",
        tokenizer,
        text_config={
            "vocab_size": len(tokenizer), "sliding_window": 6, **TEXT,
            "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "image_size": 16, "patch_size": 4,
            "num_hidden_layers": 2, "num_attention_heads": 2, "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    model.base_model.multi_modal_projector.mm_input_projection_weight.data.normal_()  # zeros else
    return model, processor


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
SIZES_2_5 = {
    "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 16,
    "fullatt_block_indexes": [1],
}  # fmt: skip
SIZES_3 = {
    "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
MAKERS: dict[str, Callable[[PreTrainedTokenizerFast], tuple[PreTrainedModel, Any]]] = {
    "llava": _llava,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "qwen2_vl": partial(
        _qwen, "qwen2_vl", "Qwen2VLProcessor", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 1}, MROPE
    ),
    "qwen2_5_vl": partial(_qwen, "qwen2_5_vl", "Qwen2_5_VLProcessor", SIZES_2_5, MROPE),
    "qwen3_vl": partial(_qwen, "qwen3_vl", "Qwen3VLProcessor", SIZES_3, MROPE | {"mrope_interleaved": True}),
}


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


SIZES = ((30, 20), (24, 24), (16, 40))


def rows_with_images(
    folder: Path, num: int, images_a_row: Sequence[int] = (1,), sizes: Sequence[tuple[int, int]] = SIZES
) -> list[dict[str, Any]]:
    """Rows in TRL's format with the images as files of `folder`."""
    draw = random.Random(0)
    rows = []
    for row in range(num):
        names = []
        for place in range(images_a_row[row % len(images_a_row)]):
            name = f"{row}-{place}.png"
            (folder / name).write_bytes(png(100 * row + place, *draw.choice(sizes)))
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


def plain_z(model: PreTrainedModel, pair: TokenizedPair) -> list[torch.Tensor]:
    """z_w, z_l by the model's own forward method, each side with its own pass of the vision tower."""
    found = []
    for side in (pair.chosen, pair.rejected):
        ids = torch.tensor([side.input_ids])
        pixels = pair.pictures.pixels()
        if model.config.model_type == "gemma3":
            pixels["token_type_ids"] = (ids == model.config.image_token_id).int()
        if "image_grid_thw" in pixels:
            pixels["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, **pixels).logits[0]
        picked = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(picked[side.num_prompt - 1 :].sum())
    return found


def tokenized(folder: Path, num: int, images_a_row: Sequence[int]) -> list[TokenizedPair]:
    """Pairs for training of rows that are written beside the model of `folder`, all but one of `num`."""
    rows = rows_with_images(folder, num, images_a_row, [(30, 20), (24, 24)])
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_records(DataConfig("file", str(folder / "pairs.jsonl"), eval_pairs=1))
    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "model")))
    return list(tokenize_records(data.train, tokenizer, 256, None, "drop").pairs)
