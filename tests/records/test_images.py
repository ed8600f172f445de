"""Images of rows: where they lie, their places in the messages, and what makes one unfit."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest

from helpers.tiny_vision import picture, png
from rcpo.common.errors import UserError
from rcpo.config.schema import DataConfig
from rcpo.records.load import load_records
from rcpo.records.messages import PLACE
from rcpo.records.record import BadRowError, PreferenceRecord


def row(**parts: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "what is it"}],
        "chosen": [{"role": "assistant", "content": "a cat"}],
        "rejected": [{"role": "assistant", "content": "a dog"}],
        **parts,
    }


def shown(*texts: str) -> list[dict[str, Any]]:
    """A user turn; "" is a place for an image."""
    parts = [{"type": "text", "text": text} if text else {"type": "image"} for text in texts]
    return [{"role": "user", "content": parts}]


def read(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> list[PreferenceRecord]:
    """The training records of these rows and one more, which is held out."""
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    held_out = folder / "held_out.jsonl"
    held_out.write_text(json.dumps(row(prompt=[{"role": "user", "content": "held out"}])))
    config = DataConfig("file", str(folder / "pairs.jsonl"), eval_path=str(held_out), eval_pairs=1, **keys)
    return load_records(config).train


def test_paths_are_relative_to_the_file_and_places_are_kept(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(1))
    (record,) = read(tmp_path, [row(images=["pictures/a.png"], prompt=shown("look ", "", " now"))])
    assert record.prompt[0]["content"] == f"look {PLACE} now"
    assert record.images[0].open().size == (30, 20)


def test_messages_of_text_have_their_images_in_front_as_in_trl(tmp_path: Path) -> None:
    encoded = {"bytes": base64.b64encode(png(1)).decode(), "path": None}
    (record,) = read(tmp_path, [row(images=[encoded, encoded])])
    assert record.prompt[0]["content"] == f"{PLACE}{PLACE}what is it"


def test_one_image_column_and_text_pairs_as_chat(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    text = {"image": "a.png", "prompt": "what is it", "chosen": "a cat", "rejected": "a dog"}
    (record,) = read(tmp_path, [text], as_chat=True)
    assert record.prompt == [{"role": "user", "content": f"{PLACE}what is it"}]


def test_image_features_of_datasets_are_read_undecoded(tmp_path: Path) -> None:
    rows = [row(images=[picture(seed)]) for seed in range(4)]
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            **{
                name: datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
                for name in ("prompt", "chosen", "rejected")
            },
        }
    )
    data = datasets.Dataset.from_list(rows, features=features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "pairs.parquet")
    for place in ("saved", "pairs.parquet"):
        records = load_records(DataConfig("file", str(tmp_path / place), eval_pairs=1))
        (first, *_) = records.train
        assert isinstance(first.images[0].data, bytes)
        assert first.images[0].open().tobytes() == picture(first.row).tobytes()
        # Four rows that differ in their images alone are four pairs.
        assert len(records.train) + len(records.held_out) == 4


def open_all(records: list[PreferenceRecord]) -> None:
    for image in records[-1].images:
        image.open()


def cut_off() -> bytes:
    stream = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 90).convert("RGB").save(stream, format="PNG")
    return stream.getvalue()[: len(stream.getvalue()) // 2]


BAD = {
    "a file that is missing": (row(images=["none.png"]), "an image file is missing"),
    "no image": (row(images=["text.png"]), "an image is of no known format"),
    "an empty file": (row(images=["empty.png"]), "an image is empty (0 bytes)"),
    "half a file": (row(images=["half.png"]), "an image is cut off"),
    "a URL": (row(images=["https://example.com/a.png"]), "an image is a URL; rcpo fetches none"),
    "a number": (row(images=[3]), "an image is int, neither a path nor bytes"),
    "more than places": (row(images=["a.png"] * 2, prompt=shown("", "x")), "there are 2 images for 1 place"),
    "fewer than places": (row(images=["a.png"], prompt=shown("", "", "x")), "there are 1 image for 2 places"),
    "a place alone": (row(prompt=shown("", "x")), "a part of the type image, and the row has no image"),
    "in a response": (
        row(images=["a.png"], chosen=[{"role": "assistant", "content": [{"type": "image"}]}]),
        "part of the type image; images stand in the prompt alone",
    ),
    "both columns": (row(images=["a.png"], image="a.png"), "both columns images and image"),
    "plain text": (
        {"image": "a.png", "prompt": "what", "chosen": " a", "rejected": " b"},
        "the prompt is plain text, which has no place for images",
    ),
    "bytes that are none": (row(images=[{"bytes": "*"}]), "the bytes of an image are text, and not base64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_told_by_reason(case: str, tmp_path: Path) -> None:
    bad, reason = BAD[case]
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "half.png").write_bytes(cut_off())
    good = row(images=["a.png"], prompt=shown("", "and this"))
    with pytest.raises((UserError, BadRowError), match=re.escape(reason)):
        open_all(read(tmp_path, [good, bad], on_bad_row="error"))


def test_a_huge_image_is_not_decoded(tmp_path: Path) -> None:
    """1200 x 1000 pixels are more than 1 million."""
    (tmp_path / "a.png").write_bytes(png(1, 1200, 1000))
    (record,) = read(tmp_path, [row(images=["a.png"])])
    assert record.images[0].open().size == (1200, 1000)
    (record,) = read(tmp_path, [row(images=["a.png"])], image_megapixels=1)
    with pytest.raises(BadRowError, match=r"more than data\.image_megapixels=1 million"):
        record.images[0].open()
