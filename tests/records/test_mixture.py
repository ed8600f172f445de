"""data.mix: pairs of each source in fixed proportions, none twice, the same at every start."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.schema import DataConfig
from rcpo.config.validate import validate
from rcpo.data.token_key import content_of
from rcpo.records.load import NOTE, PreferenceData, load_records
from rcpo.records.mixture import counts_of
from rcpo.runs.frozen import config_tree


def write(path: Path, prompts: Sequence[str]) -> str:
    rows = [{"prompt": prompt, "chosen": " yes", "rejected": " no"} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(mix: Any, **keys: Any) -> DataConfig:
    tree = compose(["data=file", "tracking=none"])
    assert tree is not None
    tree["data"] |= {"mix": mix, "eval_pairs": 1, **keys}
    return resolve(validate(tree), None).data


def prompts(data: PreferenceData) -> list[Any]:
    """Of training and held-out pairs, in the order of the rows."""
    return [record.prompt for record in sorted([*data.train, *data.held_out], key=lambda record: record.row)]


def num_of(data: PreferenceData, name: str) -> int:
    return sum(prompt.startswith(name) for prompt in prompts(data))


@pytest.mark.parametrize(
    ("available", "weights", "expected"),
    [
        ((100, 30), (0.7, 0.3), [70, 30]),  # all of the second, and what goes with it
        ((100, 30), (7, 3), [70, 30]),
        ((10, 30), (0.7, 0.3), [10, 4]),  # 10 / 0.7 = 14.28: 14 pairs, 9.8 and 4.2
        ((100, 100, 100), (1, 1, 1), [100, 100, 100]),
        ((5, 9), (1, 2), [4, 9]),  # 9 / (2/3) = 13.5: 13 pairs, 4.33 and 8.67
        ((7, 7, 7), (0.1, 0.2, 0.7), [1, 2, 7]),
        ((50,), (3,), [50]),
        ((10, 10), (1, 1000), [0, 10]),
    ],
)
def test_counts_are_the_most_that_the_proportions_allow(
    available: tuple[int, ...], weights: tuple[float, ...], expected: list[int]
) -> None:
    assert counts_of(available, weights) == expected


def test_counts_never_exceed_what_is_there_and_are_within_one_of_their_share() -> None:
    """Every size and weight up to 6: no pair twice, and no proportion is off by a pair or more."""
    for sizes in itertools.product(range(1, 7), repeat=2):
        for weights in itertools.product(range(1, 7), repeat=2):
            counts = counts_of(sizes, weights)
            assert all(num <= size for num, size in zip(counts, sizes, strict=True))
            for num, weight in zip(counts, weights, strict=True):
                assert abs(num - sum(counts) * weight / sum(weights)) < 1
            # A source at least is used up, but for a pair that would bring another's part with it.
            missing = min(size * sum(weights) / weight for size, weight in zip(sizes, weights, strict=True))
            assert sum(counts) == int(missing + 1e-9)


def test_a_mixture_is_drawn_in_its_proportions_and_counted(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"a{n}" for n in range(100)])
    b = write(tmp_path / "b.jsonl", [f"b{n}" for n in range(30)])
    data = load_records(config_of({a: 0.7, b: 0.3}))
    assert (num_of(data, "a"), num_of(data, "b"), len(set(prompts(data)))) == (70, 30, 100)
    assert data.report == [
        f"{NOTE}data.mix: 70 of 100 pairs of {a} (70.0%); 30 of 30 pairs of {b} (30.0%), "
        "drawn by data.seed=0",
        "1 held-out pairs drawn from the 100 pairs by data.seed=0",
    ]
    assert data.account.training.lines() == [
        "data.mix: 130 rows read", "  30 not drawn", "  1 held out, 99 to train on"
    ]  # fmt: skip
    # Rows are numbered as if b lay behind a.
    assert {record.row for record in data.train if str(record.prompt)[0] == "b"} <= set(range(100, 130))
    assert all(record.prompt == f"a{record.row}" for record in data.train if record.row < 100)


def test_the_draw_is_of_the_seed_and_of_nothing_else(tmp_path: Path) -> None:
    """Two sources of one size are drawn apart."""
    a = write(tmp_path / "a.jsonl", [f"a{n}" for n in range(60)])
    b = write(tmp_path / "b.jsonl", [f"b{n}" for n in range(60)])
    c = write(tmp_path / "c.jsonl", [f"c{n}" for n in range(60)])
    mix = {a: 1, b: 1, c: 2}
    first = load_records(config_of(mix))
    assert load_records(config_of(mix)) == first
    assert prompts(load_records(config_of(mix, seed=1))) != prompts(first)
    rows = {name: {prompt[1:] for prompt in prompts(first) if prompt[0] == name} for name in "ab"}
    assert len(rows["a"]) == len(rows["b"]) == 30
    assert rows["a"] != rows["b"]


def test_each_source_has_its_split_columns_and_shape(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"a{n}" for n in range(10)])
    path = tmp_path / "b.jsonl"
    other = [{"q": f"b{n}", "chosen": " yes", "rejected": " no"} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in other))
    mix = [
        {"path": [a], "weight": 1, "split": "train[50%:]"},
        {"path": f"{tmp_path}/b*.jsonl", "weight": 1, "columns": {"prompt": "q"}},
    ]
    data = load_records(config_of(mix))
    assert prompts(data) == [*(f"a{n}" for n in range(5, 10)), *(f"b{n}" for n in range(5))]
    assert [record.row for record in (*data.train, *data.held_out) if record.prompt == "b3"] == [13]


def test_bad_rows_of_a_source_are_counted_and_named_with_it(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"a{n}" for n in range(4)])
    b = write(tmp_path / "b.jsonl", ["b0", "", "b2"])
    data = load_records(config_of({a: 1, b: 1}))
    assert (num_of(data, "a"), num_of(data, "b")) == (2, 2)
    assert data.account.training.dropped == {"the prompt is empty": [5]}
    with pytest.raises(UserError) as caught:
        load_records(config_of({a: 1, b: 1}, on_bad_row="error"))
    assert str(caught.value) == (
        f"data.mix: path={b}: row 1 (counted from 0) cannot train: the prompt is empty; mend it or type "
        "data.on_bad_row=drop"
    )


def test_a_frozen_mixture_is_read_again_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are absolute, and weights stay numbers, also of whole ones."""
    write(tmp_path / "a.jsonl", ["a"])
    monkeypatch.chdir(tmp_path)
    tree = compose(["data=file", "tracking=none", "data.mix={a.jsonl: 1, owner/name: 0.5}"])
    assert tree is not None
    config = resolve(validate(tree), None)
    assert config.data.train_paths() == [f"{tmp_path}/a.jsonl", "owner/name"]
    again = validate(json.loads(json.dumps(config_tree(config))))
    assert again.data == config.data


def test_the_content_of_a_mixture_is_that_of_its_sources(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{name}.jsonl", [f"{name}{n}" for n in range(3000)]) for name in "ab")
    before = content_of(config_of({a: 1, b: 1}))
    assert before is not None
    assert before == content_of(config_of({a: 1, b: 3}))
    write(tmp_path / "b.jsonl", ["b"] * 3000)
    assert content_of(config_of({a: 1, b: 1})) != before
