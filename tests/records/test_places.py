"""Several files, globs, slices and configs: which rows are read, under which numbers, and what is said of
those that are not there."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from rcpo.common.errors import UserError
from rcpo.config.resolve import resolve
from rcpo.config.schema import DataConfig
from rcpo.config.validate import validate
from rcpo.data.token_key import content_of
from rcpo.records.load import load_records
from rcpo.records.places import Place, slices_of, spelled_out
from rcpo.records.readers import read_rows

COLUMNS = {"prompt", "chosen", "rejected"}


def pairs(numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [{"prompt": f"q{n}", "chosen": f" yes{n}", "rejected": f" no{n}"} for n in numbers]


def write(path: Path, numbers: Sequence[int]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(numbers)))
    return str(path)


def prompts(place: Place) -> list[str]:
    return [row["prompt"] for row in read_rows(place, COLUMNS).rows]


def fault(place: Place) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(place, COLUMNS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_several_files_are_one_behind_the_other(tmp_path: Path) -> None:
    """Rows are numbered in the whole, and an error names the file and the row in it."""
    a, b = write(tmp_path / "a.jsonl", [0, 1, 2]), write(tmp_path / "b.jsonl", [3, 4])
    read = read_rows(Place((b, a), None), COLUMNS)
    assert [row["prompt"] for row in read.rows] == ["q3", "q4", "q0", "q1", "q2"]
    assert list(read.numbers) == [0, 1, 2, 3, 4]
    assert read.where(3) == f"row 3 (counted from 0; row 1 of {a})"
    assert read.where(1) == f"row 1 (counted from 0; row 1 of {b})"
    assert read_rows(Place(a, None), COLUMNS).where(2) == "row 2 (counted from 0)"
    (tmp_path / "b.jsonl").write_text('{"prompt": "q"}\n{')
    assert fault(Place((a, b), None)).startswith(f"data.path={b}: line 2 is not JSON (")
    assert fault(Place((a, "no.jsonl"), None)).startswith("data.path=no.jsonl: no such file or folder; ")


def test_a_bad_row_of_several_files_is_named_with_its_file(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", [0, 1, 2]), str(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "q", "chosen": None, "rejected": "x"}))
    with pytest.raises(UserError) as caught:
        load_records(DataConfig(source="file", path=[a, b], eval_pairs=1, on_bad_row="error"))
    assert str(caught.value) == (
        f"data.path={a}, {b}: row 3 (counted from 0; row 0 of {b}) cannot train: chosen is null; mend it or "
        "type data.on_bad_row=drop"
    )


def test_a_glob_is_its_files_sorted(tmp_path: Path) -> None:
    for name, number in (("b.jsonl", 1), ("a.jsonl", 0), ("a.txt", 9), ("c.jsonl.gz", 2)):
        write(tmp_path / name, [number])
    (tmp_path / "d.jsonl").mkdir()
    (tmp_path / "c.jsonl.gz").rename(tmp_path / "d.jsonl/c.jsonl")
    assert prompts(Place(f"{tmp_path}/*.jsonl", None)) == ["q0", "q1"]
    assert prompts(Place(f"{tmp_path}/[ab].jsonl", None)) == ["q0", "q1"]
    assert prompts(Place(f"{tmp_path}/**/*.jsonl", None)) == ["q0", "q1", "q2"]
    none = f"{tmp_path}/*.csv"
    assert fault(Place(none, None)) == (
        f"data.path={none}: matches no file; give a glob that does, such as 'pairs/*.jsonl'"
    )


def test_a_file_may_have_a_globs_signs_in_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a[1]*.jsonl", [7])
    write(tmp_path / "a1b.jsonl", [8])
    assert prompts(Place(path, None)) == ["q7"]


SLICES = [
    "train[:10%]", "train[10%:]", "train[:33%]", "train[-5%:]", "train[:-5%]", "train[5%:15%]", "train[3:7]",
    "train[:3]", "train[-3:]", "train[:]", "train[2:1000]", "train[-1000:4]", "train",
    "train[:1%]+train[50%:]",    "train[1:3]+test[-1:]", "test+train[2:50%]", "train[30:100%]",
]  # fmt: skip


@pytest.mark.parametrize("num_rows", [1, 7, 50, 101])
@pytest.mark.parametrize("spec", SLICES)
def test_slices_mean_what_datasets_means(spec: str, num_rows: int) -> None:
    """Its own reading of the spec is the oracle, rounding of percent and all."""
    sizes = {"train": num_rows, "test": 4}
    theirs = datasets.ReadInstruction.from_spec(spec).to_absolute(sizes)
    expected = [(each.splitname, list(range(each.from_, each.to))) for each in theirs]
    ours = slices_of(Place("a.jsonl", spec))
    assert [(each.split, list(each.of(sizes[str(each.split)]))) for each in ours] == expected


def test_a_slice_of_a_file_keeps_the_rows_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", range(20))
    read = read_rows(Place(path, "train[10%:4]+train[-2:]"), COLUMNS)
    assert [row["prompt"] for row in read.rows] == ["q18", "q19"]  # 10 % and 4 %: rows 2 to 0, none
    read = read_rows(Place(path, "train[50%:60%]"), COLUMNS)
    assert [row["prompt"] for row in read.rows] == ["q10", "q11"]
    assert list(read.numbers) == [10, 11]
    halves = [write(tmp_path / "b.jsonl", range(3)), write(tmp_path / "c.jsonl", range(3, 6))]
    read = read_rows(Place(tuple(halves), "train[2:4]"), COLUMNS)
    assert [row["prompt"] for row in read.rows] == ["q2", "q3"]
    assert list(read.numbers) == [2, 3]


def test_training_and_held_out_slices_of_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", range(20))
    data = load_records(DataConfig(source="file", path=path, split="train[:90%]", eval_split="train[90%:]"))
    assert [record.row for record in data.train] == list(range(18))
    assert [record.row for record in data.held_out] == [18, 19]
    assert data.account.lines() == [
        f"{path} [train[:90%]]: 18 rows read, 18 to train on",
        f"{path} [train[90%:]]: 2 rows read, 2 held out",
    ]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_slices_of_formats_with_columns(tmp_path: Path, kind: str) -> None:
    rows = datasets.Dataset.from_list(pairs(range(10)))
    path = str(tmp_path / "a.parquet" if kind == "parquet" else tmp_path / "a")
    rows.to_parquet(path) if kind == "parquet" else rows.save_to_disk(path)
    assert prompts(Place(path, "train[30%:50%]")) == ["q3", "q4"]


def test_wrong_slices_are_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", range(5))
    for spec in (
        "train[:10%",
        "train[a:b]",
        "train[1]",
        "[:10%]",
        "train+",
        "train[:10%](closest)",
        "train[:150%]",
    ):
        assert fault(Place(path, spec)) == (
            f"data.split={spec}: is no slice of a split; type for example data.split='train[:10%]' or "
            "data.split='train[100:200]'"
        )
    assert fault(Place(path, "train[4:2]")) == (
        f"data.split=train[4:2]: leaves none of the 5 rows of {path}; give a wider slice"
    )
    assert fault(Place(path, "test[:2]")) == (
        f"data.split=test: {path} has no such split, only train; type data.split=train"
    )


@pytest.fixture
def several_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder as the hub has it, with two configs that its card names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "pairs"
    folder.mkdir()
    write(folder / "one.jsonl", [1])
    write(folder / "two.jsonl", [2])
    named = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{named}---\n")
    return str(folder)


def test_a_config_is_the_one_that_is_named(several_configs: str) -> None:
    assert prompts(Place(several_configs, None, config="two")) == ["q2"]
    assert prompts(Place(several_configs, "train", config="one")) == ["q1"]


def test_configs_are_listed_where_one_is_needed_or_wrong(several_configs: str, tmp_path: Path) -> None:
    assert fault(Place(several_configs, None)) == (
        f"data.config: has no value and {several_configs} has the configs one, two; type data.config=one"
    )
    assert fault(Place(several_configs, None, config="three")) == (
        f"data.config=three: {several_configs} has no such config, only one, two; type data.config=one"
    )
    path = write(tmp_path / "a.jsonl", [1])
    assert fault(Place(path, None, config="one")) == (
        f"data.config=one: {path} is a file, and has no configs; type data.config=null"
    )


def test_held_out_pairs_may_be_another_config(several_configs: str) -> None:
    data = load_records(DataConfig(source="file", path=several_configs, config="one", eval_config="two"))
    assert ([record.prompt for record in data.train], [r.prompt for r in data.held_out]) == (["q1"], ["q2"])
    with pytest.raises(UserError, match=r"data\.eval_config=2: .* type data\.eval_config=one"):
        load_records(DataConfig(source="file", path=several_configs, config="one", eval_config="2"))


def test_lists_and_globs_are_frozen_as_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed from another folder, and the cells of a sweep, find the same files."""
    from rcpo.config.compose import compose

    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs/a.jsonl", [1])
    write(tmp_path / "b.jsonl", [2])
    monkeypatch.chdir(tmp_path)

    def paths(given: str) -> Any:
        tree = compose(["data=file", f"data.path={given}", "data.eval_path=pairs/[a].jsonl", "tracking=none"])
        assert tree is not None
        config = resolve(validate(tree), None)
        assert config.data.eval_path == f"{tmp_path}/pairs/[a].jsonl"
        return config.data.path

    assert paths("[b.jsonl,pairs/a.jsonl]") == [f"{tmp_path}/b.jsonl", f"{tmp_path}/pairs/a.jsonl"]
    assert paths("pairs/*.jsonl") == f"{tmp_path}/pairs/*.jsonl"
    assert paths("[owner/name,pairs/*.jsonl]") == ["owner/name", f"{tmp_path}/pairs/*.jsonl"]


def test_a_slice_needs_no_quotes_of_its_own() -> None:
    from rcpo.config.compose import compose

    for word in ("data.split=train[:10%]", "data.split='train[:10%]'", 'data.split="train[:10%]"'):
        tree = compose(["data=file", "data.path=a.jsonl", word, "data.eval_split=train[-2:]"])
        assert tree is not None
        assert (tree["data"]["split"], tree["data"]["eval_split"]) == ("train[:10%]", "train[-2:]")


def test_the_content_of_several_files_is_that_of_all(tmp_path: Path) -> None:
    """Each file's, in order, and what a glob matches at that time."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", range(3000))
    files = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    glob = f"{tmp_path}/*.jsonl"

    def content(path: str | list[str]) -> Any:
        return content_of(DataConfig(source="file", path=path))

    assert spelled_out(glob) == files
    before, of_glob = content(files), content(glob)
    assert before is not None
    assert of_glob == before
    write(tmp_path / "b.jsonl", range(2999))
    assert content(files) != before
    write(tmp_path / "c.jsonl", range(10))
    assert len(content(glob).digests) == 3
    assert content(files[::-1]).digests == content(files).digests[::-1]
