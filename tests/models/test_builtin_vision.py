"""The model that sees and ships with rcpo: its files, whether it looks, and the script that made it."""

import dataclasses
import io
import random
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import rcpo.builtin
from rcpo.builtin.make_tiny_vision import (
    IGNORED_LABEL,
    SEQUENCES_PER_STEP,
    build_model,
    build_processor,
    draw_batch,
    train_sft,
)
from rcpo.config.schema import DataConfig, ModelConfig
from rcpo.data.batch import PairBatch
from rcpo.data.pairs import TokenizedPair
from rcpo.data.tokenize import tokenize_records
from rcpo.models.evaluation import evaluate_logprobs
from rcpo.models.load import load_model, load_tokenizer
from rcpo.models.policy import Policy
from rcpo.records.images import Image
from rcpo.records.load import load_records
from rcpo.records.scenes import SIZE, draw_scene
from rcpo.training.looking import vision_row

TINY = Path(rcpo.builtin.__file__).parent / "tiny_vision"
GAINS = ("vision_gain", "vision_gain_blank")
CONFIG = ModelConfig("builtin:tiny_vision", dtype="float32")


class Frozen(NamedTuple):
    """What `evaluate_logprobs` asks of a model."""

    policy: Policy
    device: torch.device = torch.device("cpu")

    @torch.no_grad()
    def logprobs_without_grad(self, batch: PairBatch, tokens: bool = False) -> Tensor:
        z: Tensor = self.policy(batch)
        return z


class Shipped(NamedTuple):
    model: PreTrainedModel
    pairs: list[TokenizedPair]
    pad_id: int

    def gain(self, against: str = "others") -> tuple[float, dict[str, float]]:
        """Accuracy of held-out pairs, and what is left of it and of z with wrong pictures."""
        frozen = Frozen(Policy(self.model))
        z = evaluate_logprobs(frozen, self.pairs, self.pad_id, 32)
        row = vision_row(frozen, self.pairs, z, self.pad_id, 32, against)
        return float((z.z_w > z.z_l).double().mean()), row


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    tokenizer: Any = load_tokenizer(CONFIG)
    data = load_records(DataConfig("shapes", train_pairs=1, eval_pairs=128))
    pairs = tokenize_records(data.held_out, tokenizer, 256, None, "error").pairs
    return Shipped(load_model(CONFIG).eval(), list(pairs), tokenizer.pad_token_id)


def test_files_are_small_and_hold_no_pickle() -> None:
    files = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert {Path(name).suffix for name in files} == {".json", ".jinja", ".safetensors"}
    assert sum(files.values()) < 3e6


@pytest.mark.ci("the model that sees")
def test_the_shipped_model_looks(shipped: Shipped) -> None:
    accuracy, row = shipped.gain()
    assert accuracy > 0.65
    assert row["vision_gain"] > 0.15
    assert row["vision_gain/chosen"] > 0.5


@pytest.mark.ci("the model that sees")
def test_a_model_that_ignores_images_is_found_out(shipped: Shipped) -> None:
    """The same weights, their image features zeroed: nothing is lost with wrong pictures, to the bit."""
    projector: Any = shipped.model.base_model.get_submodule("multi_modal_projector")
    handle = projector.register_forward_hook(lambda module, inputs, output: output * 0)
    try:
        _, row = shipped.gain("both")
    finally:
        handle.remove()
    assert set(row) == {f"{key}{of}" for key in GAINS for of in ("", "/chosen", "/rejected")}
    assert set(row.values()) == {0.0}


@pytest.mark.ci("the model that sees")
def test_against_blank_pictures_the_gain_is_that_of_pairs_whose_pictures_are_grey(shipped: Shipped) -> None:
    """The same pairs with grey pictures as their own, made from files, have the z that is taken off."""
    frozen = Frozen(Policy(shipped.model))
    grey = PIL.Image.new("RGB", (SIZE, SIZE), (127, 127, 127))
    stream = io.BytesIO()
    grey.save(stream, format="PNG")
    data = load_records(DataConfig("shapes", train_pairs=1, eval_pairs=128))
    records = [
        dataclasses.replace(record, images=(Image(None, stream.getvalue()),)) for record in data.held_out
    ]
    pairs = tokenize_records(records, load_tokenizer(CONFIG), 256, None, "error").pairs
    own, blank = (evaluate_logprobs(frozen, each, shipped.pad_id, 32) for each in (shipped.pairs, pairs))
    accuracy, row = shipped.gain("blank")
    assert list(row) == ["vision_gain_blank", "vision_gain_blank/chosen", "vision_gain_blank/rejected"]
    assert row["vision_gain_blank"] == accuracy - float((blank.z_w > blank.z_l).double().mean())
    assert row["vision_gain_blank/chosen"] == float((own.z_w - blank.z_w).double().mean())
    assert row["vision_gain_blank/rejected"] == float((own.z_l - blank.z_l).double().mean())
    assert row["vision_gain_blank/chosen"] > 0.5
    assert shipped.gain("none")[1] == {}


@pytest.mark.ci("24 answers one by one")
def test_it_answers_a_picture_in_plain_transformers() -> None:
    """Of 24 held-out scenes most have the right sentence, and every answer ends."""
    model, processor = AutoModelForImageTextToText.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    rng, num_right = random.Random("held-out 0"), 0
    for scene in (draw_scene(rng) for _ in range(24)):
        parts = [{"type": "image"}, {"type": "text", "text": scene.question()}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = processor(
            images=[scene.picture()], text=[text], add_special_tokens=False, return_tensors="pt"
        )
        output = model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert output[-1] == processor.tokenizer.eos_token_id
        num_right += processor.decode(output, skip_special_tokens=True) == scene.answer()
    assert num_right >= 12


@pytest.mark.ci("six steps of SFT")
def test_the_recipe_is_deterministic_and_makes_what_is_shipped() -> None:
    """The same seed gives the same bits after two steps, another does not; names, shapes and processor are
    those of the shipped folder."""
    processor = build_processor()

    def trained(seed: int) -> PreTrainedModel:
        model = build_model(processor.tokenizer, seed)
        train_sft(model, processor, steps=2, seed=seed)
        return model

    first, again, other = (trained(seed) for seed in (0, 0, 1))
    head = first.lm_head.weight
    assert torch.equal(head, again.lm_head.weight)
    assert not torch.equal(head, other.lm_head.weight)
    kept = AutoModelForImageTextToText.from_pretrained(TINY).state_dict()
    assert {name: value.shape for name, value in first.state_dict().items()} == {
        name: value.shape for name, value in kept.items()
    }
    assert AutoProcessor.from_pretrained(TINY).to_dict() == processor.to_dict()
    assert load_tokenizer(CONFIG).get_vocab() == processor.tokenizer.get_vocab()


def test_half_of_the_unsure_answers_are_wrong() -> None:
    """320 draws: 160 right with standard deviation 9. Labels are those of the responses alone."""
    processor, rng, num_right = build_processor(), random.Random(0), 0
    for _ in range(5):
        same = random.Random()
        same.setstate(rng.getstate())
        scenes = [draw_scene(same) for _ in range(SEQUENCES_PER_STEP)]
        labels = draw_batch(processor, set(), rng, is_unsure=True)["labels"]
        for scene, row in zip(scenes, labels, strict=True):
            said = processor.tokenizer.decode(row[row != IGNORED_LABEL])
            assert said.endswith(". </s>")
            assert "?" not in said
            num_right += said.removesuffix(" </s>") == scene.answer()
    assert abs(num_right - 160) < 45
