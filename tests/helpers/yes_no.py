"""Yes-or-no questions on the pictures that rcpo makes, as POPE has them, and a model that has the two words.

`model=tiny_vision` has no word for yes or no; here it gets both as new words, whose vectors are random."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from rcpo.models.load import model_place
from rcpo.records.scenes import THINGS, draw_scene

NEW_WORDS = ("yes", "no")


def make_answerer(folder: Path, seed: int = 0) -> Path:
    """The model that sees and ships with rcpo, with two words more."""
    shutil.copytree(model_place("builtin:tiny_vision"), folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {word: len(vocabulary) + idx for idx, word in enumerate(NEW_WORDS)}
    file.write_text(json.dumps(tokenizer))
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def make_questions(folder: Path, num: int, seed: str = "questions") -> list[dict[str, Any]]:
    """POPE's rows with their pictures in `folder`: as often about what is there as about what is not."""
    draw, rows = random.Random(seed), list[dict[str, Any]]()
    while len(rows) < num:
        scene, wants_yes = draw_scene(draw), len(rows) % 2 == 0
        asked = draw.choice(THINGS)
        if (asked in scene.cells) != wants_yes:
            continue
        name = f"{seed}-{len(rows)}.png"
        scene.picture().save(folder / name)
        rows.append(
            {
                "question_id": len(rows) + 1,
                "image": name,
                "text": f"is there a {asked} ?",
                "label": "yes" if wants_yes else "no",
            }
        )
    return rows


def as_pairs(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The right word chosen, the other one rejected."""
    return [
        {
            "image": row["image"],
            "prompt": [{"role": "user", "content": row["text"]}],
            "chosen": [{"role": "assistant", "content": row["label"]}],
            "rejected": [{"role": "assistant", "content": "no" if row["label"] == "yes" else "yes"}],
        }
        for row in questions
    ]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
