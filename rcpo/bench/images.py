"""The work of `rcpo bench --images`: a random Llava, pictures of the size of photographs, and pairs about
them; and the contender that encodes an image for each side of its pair.

Owns what is written into the work folder: `model` with its processor, `pictures`, `pairs.jsonl`. Blocks read
the pairs as a training does, pictures included, since TRL tokenises rows with images itself. Called by
`rcpo.bench.plan` and `rcpo.bench.block`.
"""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcpo.builtin.make_tiny import BOS, EOS, PAD, SPECIAL_TOKENS, UNK
from rcpo.builtin.make_tiny_vision import CHAT_TEMPLATE, IMAGE

PAIRS = "pairs.jsonl"
WIDTH, HEIGHT = 640, 480
"""Of a picture's file."""
SPECIAL = (*SPECIAL_TOKENS, IMAGE)


def write_work(
    images: dict[str, int], shape: dict[str, int], lengths: dict[str, int], num_pairs: int, folder: Path
) -> list[str]:
    """Write model, pictures and rows to `folder`; returns the words for them. A row more than `num_pairs` is
    held out."""
    _write_model(images, shape, folder / "model")
    words = shape["vocabulary"] - len(SPECIAL)
    _write_rows(num_pairs + 1, lengths, words, folder)
    num_tokens = (images["side"] // images["patch"]) ** 2 + lengths["prompt"] + lengths["response"]
    return [
        f"model.path={folder / 'model'}", "data=file", f"data.path={folder / PAIRS}", "data.eval_pairs=1",
        f"train.max_length={num_tokens + 16}",
    ]  # fmt: skip


def _write_model(images: dict[str, int], shape: dict[str, int], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import (
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    names = [*SPECIAL, *(f"w{number}" for number in range(shape["vocabulary"] - len(SPECIAL)))]
    tokens = Tokenizer(WordLevel({name: idx for idx, name in enumerate(names)}, unk_token=UNK))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokens.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token=PAD, unk_token=UNK, bos_token=BOS, eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    side = images["side"]
    seen = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(seen, tokenizer, images["patch"], "default", CHAT_TEMPLATE, IMAGE, 1)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={
                "model_type": "llama", "vocab_size": shape["vocabulary"], "hidden_size": shape["hidden"],
                "intermediate_size": shape["intermediate"], "num_hidden_layers": shape["layers"],
                "num_attention_heads": shape["heads"], "num_key_value_heads": shape["heads"],
                "max_position_embeddings": 4096,
                "bos_token_id": SPECIAL.index(BOS), "eos_token_id": SPECIAL.index(EOS),
                "pad_token_id": SPECIAL.index(PAD),
                "tie_word_embeddings": False,
            },
            vision_config={
                "model_type": "clip_vision_model", "hidden_size": images["hidden"],
                "intermediate_size": 4 * images["hidden"], "num_hidden_layers": images["layers"],
                "num_attention_heads": images["heads"], "image_size": side, "patch_size": images["patch"],
                "projection_dim": images["hidden"],
            },
            image_token_id=SPECIAL.index(IMAGE),
            vision_feature_layer=-1,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.float().save_pretrained(folder)
    processor.save_pretrained(str(folder))


def _write_rows(num: int, lengths: dict[str, int], num_words: int, folder: Path) -> None:
    """Rows in TRL's format: a picture, random words of it, and two random answers."""
    import numpy as np
    import PIL.Image

    draw, noise = random.Random(0), np.random.default_rng(0)
    (folder / "pictures").mkdir()
    lines = []
    for row in range(num):
        coarse = noise.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
        name = f"pictures/{row}.jpg"
        PIL.Image.fromarray(coarse).resize((WIDTH, HEIGHT)).save(folder / name, quality=90)

        def text(length: int) -> str:
            return " ".join(f"w{draw.randrange(num_words)}" for _ in range(length))

        parts = [{"type": "image"}, {"type": "text", "text": text(lengths["prompt"])}]
        entry: dict[str, Any] = {"images": [name], "prompt": [{"role": "user", "content": parts}]}
        for which in ("chosen", "rejected"):
            entry[which] = [{"role": "assistant", "content": text(lengths["response"])}]
        lines.append(json.dumps(entry) + "\n")
    (folder / PAIRS).write_text("".join(lines), encoding="utf-8")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows with pictures of a work folder, their pictures by whole paths."""
    rows = [json.loads(line) for line in (folder / PAIRS).read_text(encoding="utf-8").splitlines()]
    return [{**row, "images": [str(folder / name) for name in row["images"]]} for row in rows]


def opened(row: dict[str, Any]) -> dict[str, Any]:
    """A row as TRL's collator wants it: with its pictures read."""
    import PIL.Image

    return {**row, "images": [PIL.Image.open(path).convert("RGB") for path in row["images"]]}


@contextlib.contextmanager
def encoding_twice() -> Iterator[None]:
    """While open, the tower runs on every image once for each side of its pair, as in the model's own forward
    method."""
    from rcpo.data.batch import PairBatch
    from rcpo.data.pictures import Pixels
    from rcpo.models import policy
    from rcpo.models.sights import FAMILIES
    from rcpo.models.vision import hidden_with_images, own_pixels

    def twice(model: Any, batch: PairBatch, layout: dict[str, Any]) -> Tensor:
        if batch.pixels is not None:
            own = own_pixels(batch.pixels, FAMILIES[model.config.model_type])
            batch = batch._replace(pixels=Pixels(own, num_sides=1))
        return hidden_with_images(model, batch, layout)

    assert policy.__dict__["hidden_with_images"] is hidden_with_images
    policy.__dict__["hidden_with_images"] = twice
    try:
        yield
    finally:
        policy.__dict__["hidden_with_images"] = hidden_with_images
