"""What ends generation, read from a model's folder, and carried by its tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import rcpo.builtin
from rcpo.config.schema import ModelConfig
from rcpo.data.generation import Generation, end_tokens, generation_of
from rcpo.models.generation import end_ids
from rcpo.models.load import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model that ships: eos_token_id 3 in both files."""
    return Path(shutil.copytree(Path(rcpo.builtin.__file__).parent / "tiny", tmp_path / "model"))


def write(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize(("ids", "expected"), [(4, (4,)), ([5, 4, 5], (4, 5)), (None, (3,))])
def test_generation_config_says_what_ends_generation(folder: Path, ids: Any, expected: Any) -> None:
    """One id or a list; where it has none, config.json does."""
    write(folder / "generation_config.json", eos_token_id=ids)
    assert end_ids(str(folder)) == expected


def test_without_generation_config_the_models_config_says_it(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    write(folder / "config.json", eos_token_id=[6, 3])
    assert end_ids(str(folder)) == (3, 6)
    nested = json.loads((folder / "config.json").read_text())
    del nested["eos_token_id"]
    (folder / "config.json").write_text(json.dumps({**nested, "text_config": {"eos_token_id": 7}}))
    assert end_ids(str(folder)) == (7,)


def test_broken_files_and_places_that_are_not_there_say_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    write(folder / "config.json", eos_token_id="</s>")
    assert end_ids(str(folder)) == ()
    assert end_ids(str(tmp_path / "not-there")) == ()


def test_a_tokenizer_carries_it(folder: Path) -> None:
    write(folder / "generation_config.json", eos_token_id=[3, 2, 10_000])
    tokenizer = load_tokenizer(ModelConfig(path=str(folder), response="verbatim"))
    assert generation_of(tokenizer) == Generation((2, 3, 10_000), "verbatim")
    assert end_tokens(tokenizer) == {"<s>", "</s>"}
    tokenizer.save_pretrained(folder / "final")
    assert "rcpo" not in (folder / "final" / "tokenizer_config.json").read_text()
