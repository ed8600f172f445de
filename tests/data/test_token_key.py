"""What tokenised pairs depend on: another key wherever others could come out, the same key everywhere else,
and no key where that cannot be told."""

import dataclasses
import os
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import rcpo.data.token_key
from helpers.tiny_tokenizers import TEMPLATES, make_bpe, make_words
from rcpo.config.schema import DataConfig, FilterConfig
from rcpo.data.generation import Generation, set_generation
from rcpo.data.token_key import content_of, token_key
from rcpo.records import hub
from rcpo.records.weights import UNWEIGHTED, ColumnWeight, DoraWeight, Weighing


@pytest.fixture(autouse=True)
def all_data_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rcpo.data.token_key, "SMALLEST_BYTES", 1)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "pairs.jsonl").write_text('{"chosen": "a b", "rejected": "a c"}\n')
    return DataConfig(source="file", path=str(tmp_path / "pairs.jsonl"))


def key_of(
    config: DataConfig,
    weighing: Weighing = UNWEIGHTED,
    limits: tuple[int, int | None] = (512, None),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str | None:
    content = content_of(config)
    assert content is not None
    return token_key(content, config, weighing, limits, tokenizer or make_bpe())


def test_the_same_work_has_the_same_key(config: DataConfig) -> None:
    """What is applied to tokenised pairs is no part of it."""
    key = key_of(config)
    assert key is not None
    assert key_of(config) == key
    assert key_of(dataclasses.replace(config, filter=FilterConfig(margin_min=1.0))) == key


def test_whatever_gives_other_pairs_has_another_key(config: DataConfig) -> None:
    other_template = make_bpe()
    other_template.chat_template = TEMPLATES["chatml"]
    others = [make_bpe(writes_bos=False), *(make_bpe() for _ in range(3))]
    generations = (Generation((1,)), Generation((1, 2)), Generation(response="verbatim"))
    for tokenizer, generation in zip(others[1:], generations, strict=True):
        set_generation(tokenizer, generation)
    other_special = make_bpe()
    other_special.add_tokens(["q1"], special_tokens=True)
    keys = [
        key_of(config),
        *(
            key_of(dataclasses.replace(config, **changed))
            for changed in (
                {"split": "train"}, {"eval_split": "test"}, {"train_pairs": 3}, {"eval_pairs": 3},
                {"seed": 1}, {"on_bad_row": "drop"}, {"columns": {"chosen": "good"}},
                {"eval_path": config.path},
            )
        ),
        *(key_of(config, weighing) for weighing in (ColumnWeight(), DoraWeight(1, 1), DoraWeight(1, 2))),
        *(key_of(config, limits=limits) for limits in ((256, None), (512, 256), (512, 128))),
        *(
            key_of(config, tokenizer=tokenizer)
            for tokenizer in (make_bpe(eos=None), make_words(), other_template, other_special, *others)
        ),
    ]  # fmt: skip
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_an_edit_that_keeps_size_and_time_is_seen(config: DataConfig) -> None:
    assert config.path is not None
    path, before = Path(config.path), key_of(config)
    times = path.stat()
    path.write_text(path.read_text().replace("a c", "a d"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert key_of(config) != before


def test_held_out_pairs_of_their_own_count(tmp_path: Path, config: DataConfig) -> None:
    held_out = tmp_path / "held-out.jsonl"
    config = dataclasses.replace(config, eval_path=str(held_out))
    keys = set()
    for text in ("a", "b"):
        held_out.write_text(text)
        keys.add(key_of(config))
    assert len(keys) == 2


def test_all_files_of_a_folder_count(tmp_path: Path) -> None:
    """Another content, name or place, one more, one less."""
    folder = tmp_path / "data"
    (folder / "below").mkdir(parents=True)
    config = DataConfig(source="file", path=str(folder))
    first, second = folder / "a.jsonl", folder / "below" / "b.jsonl"
    first.write_text("x")
    second.write_text("y")
    keys = [key_of(config)]
    first.write_text("z")
    keys.append(key_of(config))
    first.rename(folder / "c.jsonl")
    keys.append(key_of(config))
    second.rename(folder / "b.jsonl")
    keys.append(key_of(config))
    (folder / ".hidden").write_text("")
    keys.append(key_of(config))
    assert len(set(keys)) == 5


def test_what_cannot_be_told_has_no_key(tmp_path: Path, config: DataConfig) -> None:
    """Generated pairs; places that are not there; links to folders; what is no file."""
    for kind in ("link", "pipe", "elsewhere"):
        (tmp_path / kind).mkdir()
    (tmp_path / "elsewhere" / "a.jsonl").write_text("x")
    (tmp_path / "link" / "more").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe" / "a.jsonl")
    paths = [tmp_path / "missing.jsonl", tmp_path / "link", tmp_path / "pipe", tmp_path / "pipe" / "a.jsonl"]
    for path in (*map(str, paths), "~nobody-of-that-name/a", "x" * 5000):
        assert content_of(dataclasses.replace(config, path=path)) is None
    assert content_of(dataclasses.replace(config, eval_path=str(tmp_path / "missing"))) is None
    assert content_of(DataConfig(source="arithmetic", train_pairs=8)) is None


def test_small_data_are_not_kept(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """37 bytes of training pairs, and as many held out."""
    for limit, is_kept in ((74, True), (75, False)):
        monkeypatch.setattr(rcpo.data.token_key, "SMALLEST_BYTES", limit)
        assert (content_of(dataclasses.replace(config, eval_path=config.path)) is not None) == is_kept


def test_a_tokenizer_that_may_do_anything_has_no_key(config: DataConfig) -> None:
    """One in Python, and one with code of its own."""

    class Own(PreTrainedTokenizerFast):  # type: ignore[misc]
        pass

    assert key_of(config, tokenizer=ByT5Tokenizer()) is None
    assert key_of(config, tokenizer=Own(tokenizer_object=make_bpe().backend_tokenizer)) is None


CLOCK = "{% set now = strftime_now(FORM) if strftime_now is defined else '' %}{{ now }}" + TEMPLATES["chatml"]


def test_a_template_that_writes_the_date_has_a_key_of_the_day(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Llama 3.2's does. A form that cannot be read off has no key."""

    def key(form: str, day: int) -> str | None:
        tokenizer = make_bpe()
        tokenizer.chat_template = CLOCK.replace("FORM", form)
        today: Any = SimpleNamespace(now=lambda: datetime(2026, 7, day))
        monkeypatch.setattr(rcpo.data.token_key, "datetime", today)
        return key_of(config, tokenizer=tokenizer)

    for form in ("'%d %b %Y'", '"%d %b %Y"'):
        assert key(form, 1) == key(form, 1) != key(form, 2)
        assert key(form, 1) is not None
    assert key("'%Y'", 1) == key("'%Y'", 2)
    assert key("form", 1) is None


def test_a_hub_data_set_counts_by_what_datasets_calls_it(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's answer is stood in for: fingerprints of splits, which `datasets` makes from the commit."""
    import datasets

    def key(*texts: str) -> str | None:
        splits = {
            name: datasets.Dataset.from_dict({"chosen": [text]})
            for name, text in zip(("train", "test"), texts, strict=True)
        }
        monkeypatch.setattr(hub, "commit_of_data", lambda name: "c" * 40)
        monkeypatch.setattr(
            datasets, "load_dataset", lambda path, name, revision: datasets.DatasetDict(splits)
        )
        return key_of(dataclasses.replace(config, path="owner/name"))

    assert key("a", "b") == key("a", "b")
    assert len({key("a", "b"), key("c", "b"), key("a", "c")}) == 3
