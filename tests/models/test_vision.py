"""Models that see: tokens, one pass of the vision tower for both sides, and gradients by plain torch."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoProcessor,
    Gemma3ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    LlavaForConditionalGeneration,
)

from helpers.tiny_vision import make_vision, plain_z, png, rows_with_images, tokenized
from rcpo.common.errors import UserError
from rcpo.config.schema import DataConfig, ModelConfig
from rcpo.data.batch import collate
from rcpo.data.joint import collate_joint
from rcpo.data.pairs import PackedPairs, pair_digest
from rcpo.data.tokenize import TokenizedData, tokenize_records
from rcpo.models.load import load_model, load_tokenizer
from rcpo.models.policy import Policy
from rcpo.records.load import load_records
from rcpo.reference.cache import pair_keys
from rcpo.training.identity import pairs_digest
from rcpo.training.looking import with_wrong_images

FAMILIES = (
    "llava",
    "qwen2_5_vl",
    *(
        pytest.param(family, marks=pytest.mark.ci("families of vision-language models"))
        for family in ("idefics3", "internvl", "qwen2_vl", "qwen3_vl", "gemma3")
    ),
    pytest.param("smolvlm", marks=pytest.mark.ci("SmolVLM's processor", needs="num2words")),
)


TOWERS = ("vision_tower", "vision_model", "visual")


WITH_OWN_PROCESSOR = (
    LlavaForConditionalGeneration, Idefics3ForConditionalGeneration, Gemma3ForConditionalGeneration,
)  # fmt: skip
"""transformers builds that of others with torchvision alone."""


class Made(NamedTuple):
    folder: Path
    config: ModelConfig
    tokenizer: Any
    pairs: PackedPairs
    rows: list[dict[str, Any]]


def tokens_of(folder: Path, tokenizer: Any, max_length: int = 256) -> TokenizedData:
    data = load_records(DataConfig("file", str(folder / "pairs.jsonl"), eval_pairs=1))
    return tokenize_records(data.train, tokenizer, max_length, None, "drop")


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    make_vision(folder / "model", request.param)
    rows = rows_with_images(folder, 6, (1, 2, 1), [(30, 20), (24, 24)])
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = ModelConfig(path=str(folder / "model"), dtype="float32", vision="train")
    tokenizer = load_tokenizer(config)
    return Made(folder, config, tokenizer, tokens_of(folder, tokenizer).pairs, rows)


def test_ids_are_the_processors_and_no_placeholder_is_scored(made: Made) -> None:
    processor = made.tokenizer.rcpo_sight.processor
    if isinstance(load_model(made.config), WITH_OWN_PROCESSOR):
        processor = AutoProcessor.from_pretrained(made.folder / "model", backend="pil")
    image_id = processor.image_token_id
    for pair in made.pairs:
        row = made.rows[pair.row]
        images = [image.open() for image in pair.pictures.images]
        for side, name in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
            answer = [{"role": "assistant", "content": [{"type": "text", "text": row[name][0]["content"]}]}]
            text = made.tokenizer.apply_chat_template([*row["prompt"], *answer], tokenize=False)
            told = processor(images=images, text=[text], add_special_tokens=False)
            assert side.input_ids == told["input_ids"][0]
            if "token_type_ids" in told:  # of Gemma 3, by which the tokens of an image see each other
                inner = processor.tokenizer.image_token_id
                assert [int(each == inner) for each in side.input_ids] == told["token_type_ids"][0]
            assert image_id not in side.input_ids[side.num_prompt :]


def test_z_and_gradient_are_those_of_plain_torch(made: Made) -> None:
    """sum of c_w z_w + c_l z_l with fixed coefficients, over pairs with one image and with two."""
    pairs, model = list(made.pairs), load_model(made.config)
    model.eval()
    coefficients = torch.tensor([[-0.3, -0.7, 0.2, -0.5, 0.4], [0.6, 0.1, -0.8, 0.9, 0.3]])
    expected = torch.stack([torch.stack(plain_z(model, pair)) for pair in pairs], dim=1)
    (coefficients * expected).sum().backward()
    gradient = {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }
    assert any(name.split(".")[1] in TOWERS for name in gradient)
    model.zero_grad()
    z = Policy(model)(collate(pairs, 0)).view(2, -1)
    (coefficients * z).sum().backward()
    assert torch.allclose(z, expected, atol=1e-4)
    for name, weight in model.named_parameters():
        if name in gradient:
            assert torch.allclose(
                weight.grad, gradient[name], atol=2e-4 * max(1.0, gradient[name].abs().max())
            ), name


def test_the_tower_runs_on_each_image_once(made: Made) -> None:
    model, batch = load_model(made.config), collate(list(made.pairs), 0)
    policy, seen = Policy(model), []
    body = model.base_model
    (tower,) = (getattr(body, name) for name in TOWERS if hasattr(body, name))
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    policy(batch)
    num_images = sum(len(pair.pictures.images) for pair in made.pairs)
    assert len(seen) == 1
    assert model.config.model_type != "llava" or seen[0] == num_images
    policy(batch, own_logits=True)
    assert seen[1] == 2 * seen[0]


@pytest.mark.parametrize("packing", [False, True])
def test_a_prompt_with_images_computed_once_is_the_batch(packing: bool, made: Made) -> None:
    """z and the gradient of sum c z, of rows with each prompt twice and of rows with it once."""
    model, pairs = load_model(made.config), list(made.pairs)
    if made.tokenizer.rcpo_sight.why_apart is not None:
        assert model.config.model_type.startswith(("qwen", "gemma3"))
        return
    coefficients = torch.tensor([-0.3, -0.7, 0.2, -0.5, 0.4, 0.6, 0.1, -0.8, 0.9, 0.3])
    found = []
    for batch in (collate(pairs, 0), collate_joint(pairs, 0, share_prefix=True, packing=packing)):
        model.zero_grad()
        z = Policy(model)(batch)
        (coefficients * z).sum().backward()
        found.append((z.detach(), {name: each.grad for name, each in model.named_parameters()}))
    (z_twice, twice), (z_once, once) = found
    assert torch.allclose(z_once, z_twice, atol=1e-4)
    for name, gradient in twice.items():
        if gradient is not None:
            scale = max(1.0, float(gradient.abs().max()))
            assert torch.allclose(once[name], gradient, atol=2e-5 * scale), name


def test_sides_apart_are_the_batch(made: Made) -> None:
    policy, batch = Policy(load_model(made.config)), collate(list(made.pairs), 0)
    with torch.no_grad():
        both = policy(batch).chunk(2)
        apart = [policy(batch.side(chosen=chosen)) for chosen in (True, False)]
    for whole, alone in zip(both, apart, strict=True):
        assert torch.allclose(whole, alone, atol=1e-4)


def test_other_images_are_another_pair(made: Made) -> None:
    pairs = list(made.pairs)
    wrong = with_wrong_images(pairs)
    assert wrong
    for place, other in wrong.items():
        assert other.chosen == pairs[place].chosen
        assert set(pair_keys(other)).isdisjoint(pair_keys(pairs[place]))
        assert pairs_digest([other]) != pairs_digest([pairs[place]])  # a resumed run refuses other pixels
        assert pair_digest(other) != pair_digest(pairs[place])
    policy = Policy(load_model(made.config))
    place, other = next(iter(wrong.items()))
    with torch.no_grad():
        right, blind = policy(collate([pairs[place]], 0)), policy(collate([other], 0))
    assert (right - blind).abs().max() > 1e-3


def trained_names(config: ModelConfig) -> set[str]:
    return {name for name, weight in load_model(config).named_parameters() if weight.requires_grad}


def test_what_trains_is_what_is_asked_for(made: Made) -> None:
    frozen, projector, everything = (
        trained_names(dataclasses.replace(made.config, vision=vision))
        for vision in ("frozen", "projector", "train")
    )
    assert frozen < projector < everything
    seeing = (*TOWERS, "multi_modal_projector", "connector")
    assert not [name for name in frozen if name.split(".")[1] in seeing]
    assert all(
        any(part in name for part in ("projector", "connector", "merger")) for name in projector - frozen
    )
    assert "lm_head.weight" in frozen


def test_a_prompt_with_images_is_not_cut(made: Made) -> None:
    shortest = min(pair.chosen.num_prompt for pair in made.pairs)
    data = tokens_of(made.folder, made.tokenizer, max_length=shortest)
    (reason,) = data.dropped
    assert (
        reason == f"the prompt with its images does not fit into train.max_length={shortest}, and is not cut"
    )
    longest = max(pair.chosen.num_prompt for pair in made.pairs)
    kept = tokens_of(made.folder, made.tokenizer, max_length=2 * longest)
    assert len(kept.pairs) == len(made.pairs)


def test_an_image_that_changes_is_an_error(made: Made, tmp_path: Path) -> None:
    pictures = made.pairs[0].pictures
    image = dataclasses.replace(pictures.images[0], path=None, data=png(999, 31, 7))
    changed = dataclasses.replace(pictures, images=(image, *pictures.images[1:]))
    with pytest.raises(UserError, match="has changed since the run was started"):
        changed.pixels()


def test_a_response_cannot_have_the_token_of_images(made: Made) -> None:
    data = load_records(DataConfig("file", str(made.folder / "pairs.jsonl"), eval_pairs=1))
    token = made.tokenizer.rcpo_sight.processor.image_token
    chosen = [{"role": "assistant", "content": f"it {token} shows"}]
    bad = dataclasses.replace(data.train[0], chosen=chosen)
    dropped = tokenize_records([bad, *data.train], made.tokenizer, 256, None, "drop").dropped
    assert list(dropped) == [f"a response has the text {token}, which stands for images"]


@pytest.mark.ci("families of vision-language models")
def test_tokens_of_an_image_see_each_other(tmp_path: Path) -> None:
    """Gemma 3: by sdpa as rcpo asks for it and by eager attention the same, without that another number; and
    rows without images among others are what they are alone."""
    make_vision(tmp_path / "model", "gemma3")
    pairs = tokenized(tmp_path, 6, (1, 0, 2))
    config = ModelConfig(path=str(tmp_path / "model"), dtype="float32")
    ours, eager = (
        Policy(load_model(dataclasses.replace(config, attention=kernel))) for kernel in (None, "eager")
    )
    batch = collate(pairs, 0)
    with torch.no_grad():
        z = ours(batch)
        assert torch.allclose(z, eager(batch), atol=1e-4)
        body = ours.model.base_model
        causal = body.forward
        body.forward = lambda *args, token_type_ids=None, **kwargs: causal(*args, **kwargs)
        assert (ours(batch) - z).abs().max() > 2e-3
        body.forward = causal
        words = [place for place, pair in enumerate(pairs) if pair.pictures is None]
        alone = ours(collate([pairs[place] for place in words], 0)).view(2, -1)
        assert torch.allclose(alone, z.view(2, -1)[:, words], atol=1e-4)
