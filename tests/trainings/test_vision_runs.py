"""Whole runs of a model that sees, by the command line: what trains, what is kept, what is refused."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.forked import rcpo as run_cli
from helpers.tiny_vision import PLACES, make_vision, picture, rows_with_images
from rcpo.config.schema import ModelConfig
from rcpo.data.pictures import sight_of
from rcpo.models.load import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("vision")
    make_vision(found / "model", "llava")
    rows = rows_with_images(found, 24, (1, 2, 1))
    (found / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return found


def words(folder: Path, *more: str) -> list[str]:
    return [
        "train", f"model.path={folder}/model", "data=file", f"data.path={folder}/pairs.jsonl",
        "data.eval_pairs=6", "train.steps=2", "train.pairs_per_step=8", "optim.lr=1e-3", "optim=sgd",
        "tracking=none", *more,
    ]  # fmt: skip


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def trained(folder: Path, name: str, *more: str) -> Path:
    run = folder / name
    done = run_cli(*words(folder, f"run_dir={run}", *more), cwd=folder)
    assert done.returncode == 0, done.stderr
    return run


def test_a_run_ends_with_a_model_that_answers_an_image(folder: Path) -> None:
    """exact calibration; two images a row; z of held-out pairs falls with wrong images by what is said."""
    run = trained(
        folder, "exact", "calibration=exact", "train.pairs_per_device=4", "metrics.vision_gain=both"
    )
    final = run / "final"
    model = AutoModelForImageTextToText.from_pretrained(final)
    processor = AutoProcessor.from_pretrained(final, backend="pil")
    parts = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(images=[picture(1)], text=[text], return_tensors="pt", add_special_tokens=False)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    first, *_, last = rows_of(run / "eval.jsonl")
    assert {"vision_gain", "vision_gain/chosen", "vision_gain/rejected"} <= set(first)
    assert first["vision_gain/chosen"] != first["vision_gain_blank/chosen"] != 0
    assert "AutoModelForImageTextToText" in (final / "README.md").read_text()
    # What sees is frozen, and stays to the bit.
    before, after = load_file(folder / "model" / "model.safetensors"), load_file(final / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if "vision" in name or "projector" in name]
    assert last["step"] == 2


@pytest.mark.ci("slow")
def test_micro_batches_do_not_matter(folder: Path) -> None:
    runs = [
        trained(folder, f"split-{size}", "model.vision=train", f"train.pairs_per_device={size}")
        for size in (1, 4)
    ]
    weights = [load_file(run / "final" / "model.safetensors") for run in runs]
    start = load_file(folder / "model" / "model.safetensors")
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-5), name
    assert any("vision" in name and not torch.equal(weights[0][name], start[name]) for name in start)


@pytest.mark.ci("families of vision-language models")
@pytest.mark.parametrize("family", ["idefics3", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_every_family_trains_and_its_final_answers_an_image(family: str, tmp_path: Path) -> None:
    """Everything trains, for 3 steps. transformers builds no processor for most of them without torchvision;
    rcpo's does."""
    make_vision(tmp_path / "model", family)
    rows = rows_with_images(tmp_path, 24, (1, 0, 2))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = trained(tmp_path, "run", "calibration=exact", "model.vision=train", "train.steps=3")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "model", run / "final")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("vision" in name or "visual" in name for name in moved)
    assert any("lm_head" in name for name in moved)
    config = ModelConfig(path=str(run / "final"))
    sight = sight_of(load_tokenizer(config))
    assert sight is not None
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (tmp_path / "model" / name).exists() and family not in ("idefics3", "gemma3"):
            assert (run / "final" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    text = f"<s> <|user|> {PLACES.get(family, '<image>')} what is it <|assistant|>"
    inputs = sight.processor(images=[picture(1)], text=[text], return_tensors="pt", add_special_tokens=False)
    model = AutoModelForImageTextToText.from_pretrained(run / "final")
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_data_shows_images_and_draws_a_sheet(folder: Path) -> None:
    """Two pairs, the second with two images; a picture of 24 x 24 pixels, cut into 9 patches, is 9 tokens."""
    words_of_data = [word for word in words(folder)[1:] if not word.startswith(("optim", "tracking"))]
    more = ["--pairs", "3", "--sheet", f"{folder}/sheet.png", "--json"]
    done = run_cli("data", *words_of_data, *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    pairs = json.loads(done.stdout)["pairs"]
    images = [image for pair in pairs for image in pair["images"]]
    assert {image["tokens"] for image in images} == {9}
    for image in images:
        with PIL.Image.open(folder / image["name"]) as picture_of_it:
            assert picture_of_it.size == (image["width"], image["height"])
    with PIL.Image.open(folder / "sheet.png") as sheet:
        assert sheet.width == 260 * min(4, len(images))
        first = picture(int(images[0]["name"].split("-")[0]) * 100)
        assert sheet.convert("RGB").getpixel((20, 20)) == first.getpixel((0, 0))
    done = run_cli("data", *words_of_data, "--pairs", "0", "--sheet", f"{folder}/none.png", cwd=folder)
    assert done.returncode == 2
    assert "none of the pairs that are shown has an image" in done.stderr
    assert not (folder / "none.png").exists()


REFUSED = {
    "train.packing=true": "train.packing=true: images are packed with their prompts once alone",
    "model.vision=lora": "model.vision=lora: there is no adapter; type model.lora.rank=16 as well, or",
    "metrics.answers=2": "metrics.answers=2: answers to images are not there yet",
    "train.evaluate=word_problems": "train.evaluate=word_problems: asks text alone",
    "data.unpair=true": "data.unpair=true: images are trained in pairs so far",
    "model.chat_template=plain": "model.chat_template=plain: has no place for images",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_not_there_is_refused_by_name(word: str, folder: Path) -> None:
    more = ["objective=kto"] if "unpair" in word else []
    done = run_cli(*words(folder, f"run_dir={folder}/refused", word, *more), cwd=folder)
    assert done.returncode == 2
    assert REFUSED[word] in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not (folder / "refused").exists()


def test_a_model_of_text_is_refused_images(folder: Path) -> None:
    of_text = [word for word in words(folder, f"run_dir={folder}/text") if not word.startswith("model.path")]
    done = run_cli(*of_text, "model=tiny", "model.chat_template=plain", cwd=folder)
    assert done.returncode == 2
    assert "has an image, and the model reads text alone" in done.stderr
    done = run_cli("train", "model.vision=train", f"run_dir={folder}/text", cwd=folder)
    assert done.returncode == 2
    assert "model.vision=train: builtin:tiny reads text alone; type model.vision=frozen" in done.stderr


@pytest.mark.ci("families of vision-language models")
def test_gemma3_is_a_model_of_text_too(tmp_path: Path) -> None:
    """On text alone it answers at evaluations; with images that and shared prompts are refused; what sees
    trains on images alone."""
    make_vision(tmp_path / "model", "gemma3")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows_with_images(tmp_path, 24, (0,)))))
    run = trained(tmp_path, "text", "metrics.answers=2", "metrics.answer_tokens=4")
    assert not any("vision_gain" in row for row in rows_of(run / "eval.jsonl"))
    (tmp_path / "images.jsonl").write_text("\n".join(map(json.dumps, rows_with_images(tmp_path, 24, (1, 0)))))
    for more, message in (
        (("model.vision=train",), "model.vision=train: no training pair has an image"),
        ((f"data.path={tmp_path}/images.jsonl", "metrics.answers=2"), REFUSED["metrics.answers=2"]),
        (
            (f"data.path={tmp_path}/images.jsonl", "train.share_prefix=true"),
            "train.share_prefix=true: the tokens of an image see each other in this family",
        ),
    ):
        done = run_cli(*words(tmp_path, f"run_dir={tmp_path}/refused", *more), cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
