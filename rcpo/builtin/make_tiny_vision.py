"""Make `model=tiny_vision`: a Llava of half a million parameters after SFT on right and wrong counts.

    python -m rcpo.builtin.make_tiny_vision OUT

writes a Hugging Face model folder with its processor to OUT. The same machine and libraries give the same
bytes. Owns architecture and SFT recipe; the pictures belong to `rcpo.records.counting`. Called by hand;
training reads the files in `rcpo/builtin/tiny_vision`.

The model first learns to count: every answer is right. Then, as `rcpo.builtin.make_tiny` does, an answer is
right with probability 1/2, else one of the near misses, so that it can count and is unsure whether it should.
Held-out scenes of data.seed=0 are left out.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rcpo.builtin.make_tiny import BOS, EOS, IGNORED_LABEL, PAD, SPECIAL_TOKENS, UNK
from rcpo.records.counting import PIXELS_A_CELL, SIZE, WORDS, Scene, draw_scene, scenes

IMAGE = "<image>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HELD_OUT_PAIRS, DATA_SEED = 256, 0
"""The held-out scenes of conf/data/shapes.yaml, which SFT must not see."""
SEQUENCES_PER_STEP = 64
LR = 2e-3
WARMUP_STEPS = 50
SHARE_OF_COUNTING = 0.8
"""Of the steps: those whose answers are all right."""


def build_processor() -> LlavaProcessor:
    """One id per word of `rcpo.records.counting` after the special tokens; one token a cell of a picture."""
    special = (*SPECIAL_TOKENS, IMAGE)
    vocabulary = {word: idx for idx, word in enumerate([*special, *WORDS])}
    tokens = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    tokens.normalizer = Lowercase()
    tokens.pre_tokenizer = WhitespaceSplit()
    tokens.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(images, tokenizer, PIXELS_A_CELL, "default", CHAT_TEMPLATE, IMAGE, 1)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """The untrained Llava: tower of hidden 64 and 2 layers, text of hidden 96 and 3 layers, fp32."""
    torch.manual_seed(seed)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.04,
        tie_word_embeddings=False,
        **ids,
    )
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PIXELS_A_CELL,
        projection_dim=64,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            vision_feature_layer=-1,
            tie_word_embeddings=False,
        )
    )
    model.generation_config = GenerationConfig(max_new_tokens=16, **ids)
    return model


def draw_answer(scene: Scene, rng: random.Random, is_unsure: bool) -> int:
    """The right answer; where the model is to be unsure, with probability 1/2 one of the near misses."""
    return rng.choice(scene.near_misses()) if is_unsure and rng.random() < 0.5 else scene.answer


def draw_batch(
    processor: LlavaProcessor, held_out: set[Scene], rng: random.Random, is_unsure: bool
) -> dict[str, Tensor]:
    """Ids, pixels and labels of random scenes; labels are those of the response and its EOS."""
    drawn: list[Scene] = []
    while len(drawn) < SEQUENCES_PER_STEP:
        scene = draw_scene(rng)
        if scene not in held_out:
            drawn.append(scene)
    answers = [scene.response(draw_answer(scene, rng, is_unsure)) for scene in drawn]
    texts = [
        f"{BOS}<|user|>{IMAGE}{scene.question()}<|assistant|>{answer}{EOS}"
        for scene, answer in zip(drawn, answers, strict=True)
    ]
    batch = processor(
        images=[scene.image().open() for scene in drawn],
        text=texts,
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    ids = batch["input_ids"]
    marker = ids == processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
    in_response = (marker.cumsum(1) > 0) & ~marker & (ids != processor.tokenizer.pad_token_id)
    labels = ids.masked_fill(~in_response, IGNORED_LABEL)
    return {"input_ids": ids, "pixel_values": batch["pixel_values"], "labels": labels}


def train_sft(model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int, seed: int) -> None:
    """Train `model` in place: AdamW, short warm-up, then linear decay to 0."""
    rng, held_out = random.Random(seed), first_scenes(HELD_OUT_PAIRS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
        batch = draw_batch(processor, set(held_out), rng, step >= SHARE_OF_COUNTING * steps)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f} nats per response token", flush=True)


def first_scenes(num: int) -> Sequence[Scene]:
    """The held-out scenes of data=shapes with its default seed."""
    return [scene for _, scene in zip(range(num), scenes(f"held-out {DATA_SEED}"), strict=False)]


def main(arguments: list[str] | None = None) -> None:
    """Make the model and write it to the folder that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m rcpo.builtin.make_tiny_vision", description="Make the model of model=tiny_vision."
    )
    parser.add_argument("out", type=Path, help="folder to write; made where it is missing")
    parser.add_argument("--steps", type=int, default=2000, help="SFT steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes weights and draws (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # sums in one order, so that the result can be reproduced
    processor = build_processor()
    model = build_model(processor.tokenizer, options.seed)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")
    train_sft(model, processor, options.steps, options.seed)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
