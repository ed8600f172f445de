"""Training and held-out pairs from a data config: columns, bad rows, duplicates, draws, and the two named
hub data sets read from local folders of their shape."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from helpers import ROOT
from rcpo.common.conf import option_tree
from rcpo.common.errors import UserError
from rcpo.config.schema import DataConfig
from rcpo.records.load import NOTE, load_records
from rcpo.records.record import PreferenceRecord

CONF = ROOT / "conf" / "data"


def rows_of(numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [{"prompt": f"q{n}", "chosen": f" yes{n}", "rejected": f" no{n}"} for n in numbers]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(path: str, **keys: Any) -> DataConfig:
    return DataConfig(**{"source": "file", "path": path, "eval_pairs": 1, **keys})


def prompts(records: list[PreferenceRecord]) -> list[Any]:
    return [record.prompt for record in records]


def fault(config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_records(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_held_out_pairs_are_drawn_by_data_seed_and_not_trained_on(tmp_path: Path) -> None:
    """10 rows, 3 held out: every row is in one of the two sets, both in the source's order."""
    path = write_rows(tmp_path / "a.jsonl", rows_of(range(10)))
    data = load_records(config_of(path, eval_pairs=3))
    assert (len(data.train), len(data.held_out)) == (7, 3)
    assert sorted([*data.train, *data.held_out], key=lambda record: record.row) == [
        PreferenceRecord(f"q{n}", f" yes{n}", f" no{n}", n) for n in range(10)
    ]
    for records in (data.train, data.held_out):
        assert [record.row for record in records] == sorted(record.row for record in records)
    assert load_records(config_of(path, eval_pairs=3)) == data
    draws = {tuple(prompts(load_records(config_of(path, eval_pairs=3, seed=n)).held_out)) for n in range(5)}
    assert len(draws) > 1
    assert data.report == ["3 held-out pairs drawn from the 10 pairs by data.seed=0"]
    assert data.account.lines() == [f"{path}: 10 rows read, 3 held out, 7 to train on"]
    assert data.account.held_out_rows == [record.row for record in data.held_out]


def test_train_pairs_draws_from_the_whole_file_and_leaves_the_held_out_set(tmp_path: Path) -> None:
    """Sorted files: the 20 of 400 rows are not the first 20."""
    path = write_rows(tmp_path / "a.jsonl", rows_of(range(400)))
    everything = load_records(config_of(path, eval_pairs=5))
    some = load_records(config_of(path, eval_pairs=5, train_pairs=20))
    assert some.held_out == everything.held_out
    assert len(some.train) == 20
    assert max(record.row for record in some.train) > 100
    assert some.report[-1] == "20 of 395 training pairs drawn by data.seed=0"
    assert some.account.lines() == [
        f"{path}: 400 rows read", "  375 not drawn", "  5 held out, 20 to train on",
    ]  # fmt: skip


def test_held_out_pairs_of_their_own_file(tmp_path: Path) -> None:
    """At most eval_pairs of them; a training pair that is held out too is dropped, one that shares only its
    prompt is counted."""
    shared_prompt = {"prompt": "q21", "chosen": " other", "rejected": " no"}
    train = write_rows(tmp_path / "a.jsonl", [*rows_of([0, 20, 1]), shared_prompt])
    held_out = write_rows(tmp_path / "b.jsonl", rows_of([20, 21]))
    data = load_records(config_of(train, eval_path=held_out, eval_pairs=2))
    assert prompts(data.train) == ["q0", "q1", "q21"]
    assert prompts(data.held_out) == ["q20", "q21"]
    assert data.report == [
        "1 training pairs dropped because they are held-out pairs too",
        "1 training pairs share their prompt with a held-out pair (kept)",
    ]
    assert data.account.lines() == [
        f"{train}: 4 rows read",
        "  1 dropped because they are held-out pairs too",
        "  3 to train on",
        f"{held_out}: 2 rows read, 2 held out",
    ]
    fewer = load_records(config_of(train, eval_path=held_out, eval_pairs=1))
    assert len(fewer.held_out) == 1
    assert "1 held-out pairs drawn by data.seed=0" in fewer.report


def test_bad_rows_stop_the_run_with_row_and_reason(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*rows_of([0]), {"prompt": "q", "chosen": None, "rejected": "x"}])
    assert fault(config_of(path, on_bad_row="error")) == (
        f"data.path={path}: row 1 (counted from 0) cannot train: chosen is null; mend it or type "
        "data.on_bad_row=drop"
    )


def test_bad_rows_are_dropped_and_counted_by_reason(tmp_path: Path) -> None:
    """Rows keep the numbers that they have in the source. A row without the prompt that others have is bad,
    not one with an implicit prompt."""
    bad = [
        {"prompt": "q", "chosen": "x", "rejected": "x"},
        {"prompt": "q", "chosen": "y", "rejected": "y"},
        {"prompt": None, "chosen": "The sky is blue", "rejected": "The sky is red"},
        {"chosen": "The sky is blue", "rejected": "The sky is red"},
        {"prompt": "q", "chosen": "a", "rejected": ""},
    ]
    path = write_rows(tmp_path / "a.jsonl", [*bad, *rows_of([5, 6])])
    data = load_records(config_of(path, on_bad_row="drop"))
    assert sorted(record.row for record in (*data.train, *data.held_out)) == [5, 6]
    assert data.account.lines() == [
        f"{path}: 7 rows read",
        "  2 dropped because the sides are identical (rows 0, 1)",
        "  2 dropped because prompt is null (rows 2, 3)",
        "  1 dropped because rejected is empty (row 4)",
        "  1 held out, 1 to train on",
    ]
    assert data.account.warnings() == [
        f"more than half of the data is lost: 5 of 7 rows of {path} are dropped (71%)"
    ]


def test_repeated_rows_are_counted_and_never_on_both_sides(tmp_path: Path) -> None:
    """One pair three times and another once: where a copy of the first is held out, its copies are not
    trained on."""
    path = write_rows(tmp_path / "a.jsonl", rows_of([0, 0, 0, 1]))
    for seed in range(8):
        data = load_records(config_of(path, seed=seed))
        assert data.report[0] == f"{path}: 2 rows repeat an earlier row (kept)"
        assert not set(prompts(data.train)) & set(prompts(data.held_out))


@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
def test_wrong_columns_are_named_before_any_row(tmp_path: Path, on_bad_row: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"question": "q", "good": "a", "bad": "b"}])
    assert fault(config_of(path, on_bad_row=on_bad_row)) == (
        f"data.path={path}: has no column chosen and no column rejected, but question, good, bad; "
        "type data.columns='{prompt: question, chosen: good, rejected: bad}'"
    )
    assert fault(config_of(path, columns={"chosen": "good", "prompt": "ask"}, on_bad_row=on_bad_row)) == (
        f"data.path={path}: has no column ask and no column rejected, but question, good, bad; "
        "type data.columns='{prompt: NAME, rejected: NAME}'"
    )


def test_columns_are_read_by_their_own_names(tmp_path: Path) -> None:
    """`prompt` is what the user says it is, also beside a column of that name."""
    rows = [{"question": f"q{n}", "good": " a", "bad": " b", "prompt": None} for n in range(2)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    data = load_records(config_of(path, columns=names))
    assert sorted(prompts(data.train) + prompts(data.held_out)) == ["q0", "q1"]
    assert fault(config_of(path, columns={"answer": "good"})) == (
        "data.columns.answer: no such part; the parts are prompt, chosen, rejected, completion, label, "
        "responses, scores, ranks, messages, tools, documents, chat_template_kwargs, images, image, gold, "
        "weight, probability, probability_chosen, probability_rejected, probabilities; type "
        "data.columns='{prompt: NAME, chosen: NAME, rejected: NAME}'"
    )


def test_what_is_for_the_template_is_read_and_makes_rows_differ(tmp_path: Path) -> None:
    """Rows alike but for their documents are different pairs; the third is the second once more, and is not
    trained on where that one is held out."""
    texts = ["a", "b", "b"]
    rows = [
        {"prompt": "q", "chosen": " yes", "rejected": " no", "passages": [{"text": text}], "tools": "[]"}
        for text in texts
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    data = load_records(config_of(path, columns={"documents": "passages"}))
    records = sorted([*data.train, *data.held_out], key=lambda record: record.row)
    assert [record.documents for record in records] in (
        [[{"text": text}] for text in kept] for kept in (texts, ["a", "b"])
    )
    assert all(record.tools is None for record in records)
    assert f"{path}: 1 rows repeat an earlier row (kept)" in data.report
    assert not [line for line in data.report if line.startswith(NOTE)]


def test_wrong_roles_throughout_are_one_line(tmp_path: Path) -> None:
    rows = [
        {"chosen": [{"role": "human", "content": "a"}], "rejected": [{"role": "gpt", "content": "b"}]}
    ] * 2
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert fault(config_of(path, on_bad_row="drop")) == (
        f"data.path={path}: none of its 2 rows can train (chosen has the role 'human'; "
        "roles are system, developer, user, assistant, tool); give pairs of another form"
    )


@pytest.mark.parametrize(
    ("num_rows", "num_held_out", "left"),
    [(60, 12, 48), (3, 1, 2), (130, 26, 104), (160, 128, 32), (158, 31, 127)],
)
def test_few_pairs_hold_out_a_fifth(tmp_path: Path, num_rows: int, num_held_out: int, left: int) -> None:
    """Where data.eval_pairs would leave less than a fifth to train on: 128 of 160 leave 32, a fifth."""
    data = load_records(config_of(write_rows(tmp_path / "a.jsonl", rows_of(range(num_rows))), eval_pairs=128))
    assert (len(data.held_out), len(data.train)) == (num_held_out, left)
    assert {record.row for record in (*data.held_out, *data.train)} == set(range(num_rows))
    assert (data.account.training.held_out, data.account.training.trained) == (num_held_out, left)
    note = (
        f"note: data.eval_pairs=128: there are {num_rows} usable pairs, so {num_held_out} of them are held "
        f"out; type data.eval_pairs={num_held_out} to say that this is meant"
    )
    assert (note in data.report) == (num_held_out != 128)


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    one, three = (write_rows(tmp_path / f"{n}.jsonl", rows_of(range(n))) for n in (1, 3))
    assert fault(config_of(one)) == (f"data.path={one}: has 1 usable pair; give at least 2, one to hold out")
    assert len(load_records(config_of(three, eval_pairs=1)).train) == 2
    assert fault(config_of(three, eval_path=three, eval_pairs=3)) == (
        f"data.path={three}: no training pair is left of 3 rows beside 3 held-out pairs; "
        "give more rows, or type a smaller data.eval_pairs=N"
    )


def test_arithmetic_needs_a_number_and_no_file() -> None:
    data = load_records(DataConfig(source="arithmetic", train_pairs=6, eval_pairs=2))
    assert (len(data.train), len(data.held_out)) == (6, 2)
    assert data.account.lines() == ["arithmetic: 8 rows read, 2 held out, 6 to train on"]
    assert fault(DataConfig(source="arithmetic", path="x.jsonl")) == (
        "data.path=x.jsonl: data=arithmetic reads no file; type data=file"
    )
    assert fault(DataConfig(source="arithmetic")) == (
        "data.train_pairs=null: data=arithmetic needs a number; type data.train_pairs=2048"
    )


def named_config(name: str, path: Path) -> DataConfig:
    """conf/data/NAME.yaml as it ships, but for the place."""
    return DataConfig(**{**option_tree(CONF / f"{name}.yaml"), "path": str(path)})


def save(path: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """As `save_to_disk` writes a data set with splits."""
    sets = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    datasets.DatasetDict(sets).save_to_disk(path)


def save_clone(path: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """As a clone of the hub's repository looks."""
    (path / "data").mkdir(parents=True)
    (path / "README.md").write_text("# pairs")
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(path / "data" / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("save", [save, save_clone])
def test_ultrafeedback_is_read_from_a_folder_of_its_shape(
    tmp_path: Path, save: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its columns and all its splits; an empty answer, as it really has, is dropped and counted."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def row(n: int, chosen: str) -> dict[str, Any]:
        sides = [
            [{"content": f"q{n}", "role": "user"}, {"content": text, "role": "assistant"}]
            for text in (chosen, f"no{n}")
        ]
        return {
            "prompt": f"q{n}", "prompt_id": f"id{n}", "chosen": sides[0], "rejected": sides[1],
            "messages": sides[0], "score_chosen": 8.0, "score_rejected": 5.5,
        }  # fmt: skip

    train, test = [row(0, "yes"), row(1, ""), row(2, "yes")], [row(3, "yes")]
    save(
        tmp_path / "uf",
        {"train_sft": test, "test_sft": test, "train_prefs": train, "test_prefs": test, "test_gen": test},
    )
    data = load_records(named_config("ultrafeedback", tmp_path / "uf"))
    assert [record.row for record in data.train] == [0, 2]
    assert data.held_out == [
        PreferenceRecord(
            [{"role": "user", "content": "q3"}],
            [{"role": "assistant", "content": "yes"}],
            [{"role": "assistant", "content": "no3"}],
            0,
        )
    ]
    assert data.account.lines()[:2] == [
        f"{tmp_path}/uf [train_prefs]: 3 rows read", "  1 dropped because chosen is empty (row 1)",
    ]  # fmt: skip


def test_hh_rlhf_is_read_from_a_folder_of_its_shape(tmp_path: Path) -> None:
    """Raw strings, split at the last assistant turn of each side."""

    def row(n: int) -> dict[str, str]:
        start = f"\n\nHuman: q{n}\n\nAssistant: a\n\nHuman: more\n\nAssistant:"
        return {"chosen": f"{start} yes", "rejected": f"{start} no"}

    save(tmp_path / "hh", {"train": [row(0), row(1)], "test": [row(2)]})
    data = load_records(named_config("hh_rlhf", tmp_path / "hh"))
    assert len(data.train) == 2
    assert data.held_out == [
        PreferenceRecord(
            [
                {"role": "user", "content": "q2"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "more"},
            ],
            [{"role": "assistant", "content": "yes"}],
            [{"role": "assistant", "content": "no"}],
            0,
        )
    ]


def test_what_is_not_trained_on_is_named(tmp_path: Path) -> None:
    """Columns, and keys of messages; a prompt that both sides repeat is counted."""
    rows = [
        {
            "prompt": "a b",
            "chosen": f"a b c{row}",
            "rejected": f"a b d{row}",
            "score_chosen": 1,
            "note": "x",
        }
        for row in range(4)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = load_records(DataConfig(source="file", path=str(tmp_path / "a.jsonl"), eval_pairs=1)).report
    assert f"{NOTE}{tmp_path}/a.jsonl: columns that are not used: score_chosen, note" in report
    assert any("in 4 rows both sides begin with the prompt" in line for line in report)
    chat = DataConfig(source="file", path=str(tmp_path / "a.jsonl"), eval_pairs=1, as_chat=True)
    (said,) = (line for line in load_records(chat).report if "begin with the prompt" in line)
    assert said.endswith("scored; cut it from the sides")
    turn = {"role": "assistant", "content": "c", "id": 3}
    rows = [
        {"prompt": "a", "chosen": [turn], "rejected": [{**turn, "content": f"d{row}"}]} for row in range(4)
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = load_records(DataConfig(source="file", path=str(tmp_path / "b.jsonl"), eval_pairs=1)).report
    assert f"{NOTE}{tmp_path}/b.jsonl: keys of messages that are not used: id (8 messages)" in report
