"""`rcpo generate` of models that see: answers to prompts with images, against transformers' own processor."""

import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.tiny_vision import make_vision, png, rows_with_images
from rcpo import cli
from rcpo.commands import generate
from rcpo.commands.parser import command_parser
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.validate import validate
from rcpo.data.batch import collate
from rcpo.data.tokenize import tokenize_records
from rcpo.evaluation.decoding import Decoding, answer_all
from rcpo.evaluation.prompts import Asking, read_prompts
from rcpo.evaluation.subject import Loaded, find_subject
from rcpo.models.load import model_place
from rcpo.models.policy import Policy
from rcpo.records.arithmetic import assistant_turn
from rcpo.records.load import load_records
from rcpo.records.record import PreferenceRecord
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree

LONGEST = 512


def run(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", *words])
    assert stop.value.code == 0


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def model_and_prompts(folder: Path, family: str) -> Path:
    """A model and prompts with one, no and two images of several sizes."""
    make_vision(folder / "model", family)
    kept = ("images", "prompt")
    rows = [{key: row[key] for key in kept} for row in rows_with_images(folder, 5, (1, 0, 2))]
    return write(folder, rows)


@pytest.mark.ci("the model that sees")
def test_answers_are_those_of_transformers_own_processor(tmp_path: Path) -> None:
    """Five prompts in one batch, against each by itself through AutoProcessor; the words of the prompt are
    kept with the places of its images, so that the file can be asked again."""
    file = model_and_prompts(tmp_path, "llava")
    run(f"{tmp_path}/model", f"prompts={file}", f"out={tmp_path}/out.jsonl", "max_new_tokens=6", "batch=5")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model", backend="pil")
    said = rows_of(tmp_path / "out.jsonl")
    for row, line in zip(rows_of(file), said, strict=True):
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        images = [PIL.Image.open(tmp_path / name).convert("RGB") for name in row["images"]]
        inputs = processor(images=images or None, text=[text], add_special_tokens=False, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert line["response"] == processor.decode(new, skip_special_tokens=True).strip()
        assert [turn["role"] for turn in line["prompt"]] == ["user"]
        assert line["images"] == row["images"]
        if row["images"]:
            assert line["prompt"] == row["prompt"]
    assert len({line["response"] for line in said}) > 1
    (tmp_path / "again.jsonl").write_text((tmp_path / "out.jsonl").read_text())
    again = [prompt.opening for prompt in read_prompts(tmp_path / "again.jsonl")]
    assert again == [prompt.opening for prompt in read_prompts(file)]


@pytest.mark.ci("families of vision-language models")
@pytest.mark.parametrize("family", ["idefics3", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_answer_is_that_of_the_prompt_alone_and_its_first_token_has_the_z_of_training(
    family: str, tmp_path: Path
) -> None:
    """In a batch of five as alone; the log-probability of a word as the first one is the z of a response of
    that word, by training's own pass."""
    file = model_and_prompts(tmp_path, family)
    loaded = Loaded(find_subject(f"{tmp_path}/model"), may_see=True)
    asking: Asking = loaded.asking
    prompts = read_prompts(file)
    asked = [asking.asked(asking.conversation(prompt), prompt.images) for prompt in prompts]
    words = [loaded.tokenizer.convert_tokens_to_ids(word) for word in ("red", "blue")]
    decoding = Decoding(max_new_tokens=5, answers_per_batch=5)

    def answers(batch: list[Any]) -> list[Any]:
        found: dict[int, Any] = {}
        for part in answer_all(loaded.model, batch, decoding, asking.stop_ids, asking.pad_id, words):
            found |= part
        return [found[place] for place in range(len(batch))]

    together = answers(asked)
    alone = [answers([each])[0] for each in asked]
    assert [each.ids for each in together] == [each.ids for each in alone]
    assert torch.allclose(
        *(torch.tensor([each.watched for each in side]) for side in (together, alone)), atol=1e-5
    )
    records = [
        PreferenceRecord(prompt.opening, assistant_turn("red"), assistant_turn("blue"), row,
                         images=prompt.images)
        for row, prompt in enumerate(prompts)
    ]  # fmt: skip
    pairs = tokenize_records(records, loaded.tokenizer, LONGEST, None, "error", {}, False).pairs
    with torch.no_grad():
        z = Policy(loaded.model)(collate(list(pairs), asking.pad_id)).view(2, -1).T
    assert torch.allclose(torch.tensor([each.watched for each in together]), z, atol=1e-5)


@pytest.mark.ci("the model that sees")
def test_held_out_prompts_of_a_run_are_asked_with_their_pictures(tmp_path: Path) -> None:
    """A run that ended where it began: most of the model's answers about its own pictures are sentences of
    the data, and more of them are right than of the same questions with one another's."""
    words = ["model=tiny_vision", "data=shapes", "data.eval_pairs=24", "tracking=none"]
    tree = compose([f"run_dir={tmp_path}/run", *words])
    assert tree is not None
    config = resolve(validate(tree), None)
    RunFolder(tmp_path / "run").create(config, config_tree(config))
    shutil.copytree(model_place("builtin:tiny_vision"), tmp_path / "run/final")
    run(f"{tmp_path}/run", "prompts=held_out", f"out={tmp_path}/out.jsonl", "max_new_tokens=12")
    right = [record.chosen[0]["content"] for record in load_records(config.data).held_out]  # type: ignore[index]
    said = [line["response"] for line in rows_of(tmp_path / "out.jsonl")]
    shifted = [*right[1:], right[0]]
    assert sum(map(str.__eq__, said, right)) >= 12 > sum(map(str.__eq__, said, shifted))


@pytest.mark.parametrize(
    ("row", "words", "said"),
    [
        ({"prompt": "what is it", "image": "none.png"}, [], r"an image file is missing: .*none.png; mend"),
        ({"prompt": "what is it", "images": ["http://x/y.png"]}, [], "an image is a URL; rcpo fetches none"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            [],
            "row 0 .*: a message has a part of the type image, and the row has no image; mend it",
        ),
        ({"instruction": "what is it", "image": "a.png"}, ["format=alpaca_eval"], "type format=jsonl"),
        (
            {"prompt": "what is it", "image": "a.png"},
            ["builtin:tiny"],
            "row 0 .* has an image, and tiny reads text alone; give a vision-language model",
        ),
        ({"prompt": "what is it", "image": "broken.png"}, [], "row 0 .*: an image is of no known format"),
    ],
)  # fmt: skip
def test_prompts_whose_images_cannot_be_shown_are_one_line(
    row: dict[str, Any], words: list[str], said: str, tmp_path: Path
) -> None:
    """Before any weights are loaded."""
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    file = write(tmp_path, [row])
    place = [] if "builtin:tiny" in words else ["builtin:tiny_vision"]
    out = f"out={tmp_path}/out.json" + ("" if "format=alpaca_eval" in words else "l")
    with pytest.raises(UserError, match=said):
        generate.run(command_parser("generate").parse_args([*place, f"prompts={file}", out, *words]))
    assert not list(tmp_path.glob("out.*"))
