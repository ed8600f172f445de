"""A data set's own split for held-out pairs is used where the config names none."""

import json
from pathlib import Path

import pytest

from rcpo.config.schema import DataConfig
from rcpo.records.held_out_split import with_held_out_split

CASES = [
    (["train", "test"], None, "test"),
    (["test", "validation", "train"], None, "validation"),
    (["train_prefs", "train_sft", "test_sft", "test_prefs"], "train_prefs", "test_prefs"),
    (["train", "test"], "train[:10%]", "test"),
    (["train", "test"], "train+test", None),
    (["train", "test"], "test", None),
    (["train"], None, None),
    (["a", "test"], "a", "test"),
    (["a", "test"], None, None),  # which to train on is asked first
    (["train", "test_sft"], None, None),
]
"""Splits, data.split, and what is held out."""


@pytest.mark.parametrize(("splits", "split", "expected"), CASES)
def test_which_split_is_held_out(
    tmp_path: Path, splits: list[str], split: str | None, expected: str | None
) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    config = DataConfig(source="file", path=str(tmp_path), split=split)
    found, notes = with_held_out_split(config)
    assert found.eval_split == expected
    used = (split or "train").split("+")[0].split("[")[0]
    assert notes == [] if expected is None else f"data.eval_split={used} to draw" in notes[0]


def test_what_the_config_says_stays(tmp_path: Path) -> None:
    """A split of its own, a file of held-out pairs, files, and problems made on the spot."""
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    (tmp_path / "a.jsonl").write_text("")
    for config in (
        DataConfig(source="file", path=str(tmp_path), eval_split="train"),
        DataConfig(source="file", path=str(tmp_path), eval_path="other.jsonl"),
        DataConfig(source="file", path=str(tmp_path / "a.jsonl")),
        DataConfig(source="file", path=str(tmp_path / "*.jsonl")),
        DataConfig(source="arithmetic"),
    ):
        assert with_held_out_split(config) == (config, [])
