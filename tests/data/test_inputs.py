"""What a run reads: the embedded default and files, the report of it, and bad data that ends in one line and
exit code 2 before there is a run folder."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rcpo.builtin
import rcpo.data.token_key
import rcpo.data.tokenize
import rcpo.training.read_inputs
from helpers import forked
from helpers.inputs import config_of, fault, row
from rcpo.config.resolve import resolve
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.schema import Config
from rcpo.config.validate import validate
from rcpo.data.inputs import Inputs
from rcpo.data.tokenize import TokenizedPair
from rcpo.records.account import Account, RowAccount
from rcpo.runs.frozen import config_tree
from rcpo.training.read_inputs import read_inputs


def file_config(path: Path, rows: list[dict[str, Any]], **groups: dict[str, Any]) -> Config:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "source": "file",
        "path": str(path),
        "train_pairs": None,
        "eval_pairs": 1,
        **groups.pop("data", {}),
    }
    return config_of(data=data, **groups)


ROWS = [row(name, "seven", "eight") for name in ("alice", "bob", "carol", "david")]


TEXT_ROWS = [
    {
        "prompt": f"{name} has one apples and gets six more . how many ?",
        "chosen": " seven",
        "rejected": " eight",
    }
    for name in ("alice", "bob", "carol", "david")
]


def scored(inputs: Inputs, pair: TokenizedPair) -> list[str]:
    """The tokens of both responses."""
    tokens = inputs.tokenizer.convert_ids_to_tokens
    return [" ".join(tokens(side.input_ids[side.num_prompt :])) for side in (pair.chosen, pair.rejected)]


def test_the_embedded_default_is_read_and_described() -> None:
    """30 and 10 word problems; the last entry of the report shows one pair and what of it is scored."""
    inputs = read_inputs(config_of())
    assert (len(inputs.train), len(inputs.held_out)) == (30, 10)
    assert inputs.report[0] == "arithmetic: 40 rows read, 10 held out, 30 to train on"
    assert inputs.report[-2] == "30 training pairs, 10 held-out pairs"
    title, prompt, chosen, rejected = inputs.report[-1].splitlines()
    assert title == "one training pair as the model sees it:"
    assert prompt.startswith("prompt   (")
    assert "⟦<s>⟧⟦<|user|>⟧" in prompt
    right, wrong = scored(inputs, inputs.train[0])
    assert right.endswith("</s>")
    assert chosen.endswith("scored): «" + right.replace(" </s>", "⟦</s>⟧") + "»")
    assert rejected.endswith("scored): «" + wrong.replace(" </s>", "⟦</s>⟧") + "»")


def test_every_rank_reads_the_same() -> None:
    first, second = read_inputs(config_of()), read_inputs(config_of())
    assert (first.train, first.held_out, first.report) == (second.train, second.held_out, second.report)
    assert first.sampler(config_of()).global_batch(9) == second.sampler(config_of()).global_batch(9)


def test_the_runs_seed_shuffles_and_the_datas_seed_draws() -> None:
    """seed=1 changes the order of training alone, data.seed=1 the pairs."""
    config = config_of()
    other_order = resolve(validate(config_tree(config) | {"seed": 1}), None)
    inputs = read_inputs(config)
    assert read_inputs(other_order).train == inputs.train
    assert inputs.sampler(other_order).global_batch(0) != inputs.sampler(config).global_batch(0)
    data = {"source": "arithmetic", "train_pairs": 30, "eval_pairs": 10, "seed": 1}
    assert read_inputs(config_of(data=data)).train != inputs.train


@pytest.mark.parametrize(
    ("train", "num_steps"), [({"steps": 7}, 7), ({"epochs": 2}, 15), ({"epochs": 0.1}, 1), ({}, 150)]
)
def test_steps_of_a_run(train: dict[str, Any], num_steps: int) -> None:
    """30 pairs, 4 a step: 2 epochs are 15 steps, 0.1 epochs 0.75; without either, 150."""
    config = config_of(train={"pairs_per_step": 4, "device": "cpu", **train})
    assert read_inputs(config).num_steps(config) == num_steps


def test_padding_needs_no_pad_token() -> None:
    for pad, expected in ((None, 0), (5, 5)):
        tokenizer: Any = SimpleNamespace(pad_token_id=pad)
        assert Inputs(tokenizer, [], [], [], Account(RowAccount("", 0))).pad_id == expected


def test_pairs_of_a_file_are_scored_on_the_answer_alone(tmp_path: Path) -> None:
    inputs = read_inputs(file_config(tmp_path / "a.jsonl", ROWS, train={"pairs_per_step": 3}))
    assert [scored(inputs, pair) for pair in inputs.train] == [["seven </s>", "eight </s>"]] * 3
    assert inputs.report[:2] == [
        f"{tmp_path}/a.jsonl: 4 rows read, 1 held out, 3 to train on",
        "1 held-out pairs drawn from the 4 pairs by data.seed=0",
    ]


CUT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
"""As DeepSeek-R1's."""


def test_reasoning_that_a_template_cuts_is_told_once_and_trained_verbatim(tmp_path: Path) -> None:
    (tmp_path / "cut.jinja").write_text(CUT)
    rows = [*ROWS, *(row(name, "two </think> seven", "one </think> nine") for name in ("eve", "frank"))]
    model = {"path": "builtin:tiny", "chat_template": str(tmp_path / "cut.jinja")}
    groups: dict[str, Any] = {"data": {"on_bad_row": "drop"}, "train": {"pairs_per_step": 2}}
    inputs = read_inputs(file_config(tmp_path / "a.jsonl", rows, model=model, **groups))
    assert {pair.row for pair in inputs.train} <= set(range(4))
    notes = [line.removeprefix("note: ") for line in inputs.report if line.startswith("note: ")]
    assert [note.split(":")[0] for note in notes] == [
        "the chat template ends its generation prompt with <think>, and leaves that out where it writes a "
        "response, which is trained so; model.response=verbatim puts responses behind it",
        "the chat template writes no <s> in front, so that inference does not see it either; if the model "
        "was trained with it, begin the template with it",
        "row 4 (counted from 0), for one",
    ]
    assert notes[2].endswith("; it leaves out 'two </think>'")
    model["response"] = "verbatim"
    inputs = read_inputs(
        file_config(tmp_path / "b.jsonl", rows[4:], model=model, train={"pairs_per_step": 1})
    )
    assert scored(inputs, inputs.train[0]) == ["<unk> seven </s>", "<unk> nine </s>"]


def test_text_pairs_pass_through_the_template_where_that_is_asked_for(tmp_path: Path) -> None:
    """The embedded model has a chat template: without as_chat its markers are in no prompt, and a note says
    so."""
    markers = "⟦<|user|>⟧"
    read = {}
    for as_chat in (None, False, True):
        groups: dict[str, Any] = {"data": {"as_chat": as_chat}, "train": {"pairs_per_step": 3}}
        read[as_chat] = read_inputs(file_config(tmp_path / "a.jsonl", TEXT_ROWS, **groups))
        notes = [line for line in read[as_chat].report if "are trained without the chat template" in line]
        assert len(notes) == (as_chat is None)
        assert (markers in read[as_chat].report[-1]) == (as_chat is True)
    assert read[None].train == read[False].train
    assert [scored(read[True], pair) for pair in read[True].train] == [["seven </s>", "eight </s>"]] * 3


def test_the_report_says_what_the_limits_cut(tmp_path: Path) -> None:
    """Prompts of 15 tokens in 8."""
    train = {"pairs_per_step": 3, "max_length": 8}
    report = read_inputs(file_config(tmp_path / "a.jsonl", ROWS, train=train)).report
    assert "training pairs: 3 prompts cut from the left (train.max_length=8)" in report
    assert "held-out pairs: 1 prompts cut from the left (train.max_length=8)" in report


def test_fewer_pairs_than_a_step_takes_are_refused(tmp_path: Path) -> None:
    assert fault(file_config(tmp_path / "a.jsonl", ROWS, train={"pairs_per_step": 4})) == (
        "train.pairs_per_step=4: there are only 3 training pairs; type train.pairs_per_step=3 or less"
    )


def test_rows_beyond_the_models_positions_are_refused(tmp_path: Path) -> None:
    """The embedded model goes to 1024 positions: with a longer limit, longer rows are refused; cut, they
    train."""
    long = " ".join(["seven"] * 1100)
    rows = [row("alice", f"{long} six", f"{long} two")] * 2
    rows += [row("bob", f"six {long}", f"two {long}")] * 2
    groups = {"data": {"eval_pairs": 1}, "train": {"pairs_per_step": 1, "max_length": 2048}}
    said = fault(file_config(tmp_path / "a.jsonl", rows, **groups))
    assert said.startswith("train.max_length: the longest row has 11")
    assert said.endswith("takes 1024; type train.max_length=1024")
    groups = {"data": {"eval_pairs": 1}, "train": {"pairs_per_step": 1, "max_length": 1024}}
    assert read_inputs(file_config(tmp_path / "b.jsonl", rows[2:] + ROWS[:1], **groups)).train


def test_pairs_that_the_model_cannot_tell_apart_stop_or_are_dropped(tmp_path: Path) -> None:
    """Both answers are unknown words. Where every training pair is such, nothing is left."""
    alike = [row(name, "Paris", "London") for name in ("alice", "bob", "carol", "david")]
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(json.dumps(ROWS[0]) + "\n")
    data = {"eval_path": str(held_out)}
    assert fault(file_config(tmp_path / "a.jsonl", alike, data={**data, "on_bad_row": "error"})) == (
        "data: row 0 (counted from 0) cannot train: the sides are identical once tokenised; mend it or type "
        "data.on_bad_row=drop"
    )
    assert fault(file_config(tmp_path / "a.jsonl", alike, data={**data, "on_bad_row": "drop"})) == (
        f"data.path={tmp_path}/a.jsonl: no training pair is left of 4 rows beside 1 held-out pairs (4 "
        "dropped because the sides are identical once tokenised); give more rows, or rows of another form"
    )
    mixed = file_config(
        tmp_path / "a.jsonl", [alike[0], *ROWS[1:]], data={**data, "on_bad_row": "drop"},
        train={"pairs_per_step": 3},
    )  # fmt: skip
    inputs = read_inputs(mixed)
    assert [pair.row for pair in inputs.train] == [1, 2, 3]
    assert "  1 dropped because the sides are identical once tokenised (row 0)" in inputs.report


@pytest.mark.parametrize(
    ("content", "words", "expected"),
    [
        (None, [], "no such file or folder; give a file ("),
        ('{"chosen": "a"}\n{"chosen": a}\n', [], "line 2 is not JSON (Expecting value); "),
        (
            '{"chosen": [{"role": "human", "content": "a"}], "rejected": [{"role": "gpt", "content": "b"}]}',
            ["data.on_bad_row=error"],
            "row 0 (counted from 0) cannot train: chosen has the role 'human'; roles are ",
        ),
    ],
    ids=["missing", "not JSON", "wrong roles"],
)
def test_bad_data_is_one_line_exit_code_2_and_no_run_folder(
    tmp_path: Path, content: str | None, words: list[str], expected: str
) -> None:
    if content is not None:
        (tmp_path / "pairs.jsonl").write_text(content)
    done = forked.rcpo("train", "data=file", "data.path=pairs.jsonl", *words, cwd=tmp_path)
    assert done.returncode == 2
    shown = "pairs.jsonl" if content is None else tmp_path / "pairs.jsonl"
    assert done.stderr.startswith(f"rcpo: data.path={shown}: {expected}")
    assert done.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"pairs.jsonl"}


# Tokenised data that are kept


@pytest.fixture
def all_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny files too."""
    monkeypatch.setattr(rcpo.data.token_key, "SMALLEST_BYTES", 1)


@contextlib.contextmanager
def nothing_is_tokenised() -> Iterator[None]:
    def refuse(*args: Any) -> Any:
        raise AssertionError("tokenised again")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_records", "Tokeniser"):
            patch.setattr(rcpo.training.read_inputs, name, refuse)
        yield


def kept_folders() -> list[Path]:
    return sorted(path.parent for path in Path(os.environ["RCPO_CACHE"]).glob("tokens/*/tokens.json"))


def test_the_second_start_reads_the_same_without_tokenising(tmp_path: Path, all_are_kept: None) -> None:
    """Pairs, order, batches, steps and the whole report, with rows dropped, prompts cut and weights read."""
    rows = [{**each, "weight": 0.1 * number} for number, each in enumerate(ROWS)]
    rows.insert(1, {"chosen": "a", "rejected": None, "weight": 1})
    config = file_config(
        tmp_path / "a.jsonl", rows, objective={"sample_weight": "weight"}, data={"on_bad_row": "drop"},
        train={"pairs_per_step": 2, "max_length": 12, "epochs": 2},
    )  # fmt: skip
    fresh = read_inputs(config)
    with nothing_is_tokenised():
        again = read_inputs(config)
    assert (again.train, again.held_out, again.report) == (fresh.train, fresh.held_out, fresh.report)
    for part in (
        "  1 dropped because rejected is null (row 1)",
        "prompts cut from the left",
        "weights: mean",
        "as the model sees it",
    ):
        assert sum(part in line for line in again.report) >= 1
    assert [again.sampler(config).global_batch(step) for step in range(9)] == [
        fresh.sampler(config).global_batch(step) for step in range(9)
    ]
    assert again.num_steps(config) == fresh.num_steps(config) == 3
    for folder in kept_folders():
        shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rcpo.data.token_key, "SMALLEST_BYTES", 10**9)
        unkept = read_inputs(config)
    assert kept_folders() == []
    assert (unkept.train, unkept.held_out, unkept.report) == (fresh.train, fresh.held_out, fresh.report)


@pytest.mark.parametrize("change", ["data", "template", "max_length", "tokenizer"])
def test_other_inputs_are_tokenised_again(tmp_path: Path, all_are_kept: None, change: str) -> None:
    """And give what they would have given without a cache."""
    config = file_config(tmp_path / "a.jsonl", ROWS, train={"pairs_per_step": 3})
    before = read_inputs(config)
    rows, groups = ROWS, {}
    if change == "data":
        rows = [row(name, "seven", "nines") for name in ("alice", "bob", "carol", "david")]
    elif change == "template":
        groups = {"model": {"chat_template": "plain"}}
    elif change == "max_length":
        groups = {"train": {"pairs_per_step": 3, "max_length": 9}}
    else:
        folder = tmp_path / "model"
        shutil.copytree(Path(rcpo.builtin.__file__).parent / "tiny", folder)
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"seven"', '"other"'))
        groups = {"model": {"path": str(folder)}}
    groups.setdefault("train", {"pairs_per_step": 3})
    config = file_config(tmp_path / "a.jsonl", rows, **groups)
    after = read_inputs(config)
    assert after.train != before.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rcpo.data.token_key, "SMALLEST_BYTES", 10**9)
        assert read_inputs(config).train == after.train
    assert len(kept_folders()) == 2


def test_kept_pairs_are_checked_against_the_model_and_the_batch(tmp_path: Path, all_are_kept: None) -> None:
    """The same tokens under a model with fewer positions, and more pairs a step than there are."""
    folder = tmp_path / "model"
    shutil.copytree(Path(rcpo.builtin.__file__).parent / "tiny", folder)
    groups: dict[str, Any] = {"model": {"path": str(folder)}, "train": {"pairs_per_step": 3}}
    read_inputs(file_config(tmp_path / "a.jsonl", ROWS, **groups))
    told = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 16}
    (folder / "config.json").write_text(json.dumps(told))
    with nothing_is_tokenised():
        said = fault(file_config(tmp_path / "a.jsonl", ROWS, **groups))
        assert said.startswith("train.max_length: the longest row has ")
        groups = {"train": {"pairs_per_step": 4}}
        assert fault(file_config(tmp_path / "a.jsonl", ROWS, **groups)).startswith("train.pairs_per_step=4: ")


def test_generated_and_small_data_are_not_kept(tmp_path: Path) -> None:
    read_inputs(config_of())
    read_inputs(file_config(tmp_path / "a.jsonl", ROWS, train={"pairs_per_step": 3}))
    assert kept_folders() == []


GEMMA_LIKE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def system_rows(tmp_path: Path) -> list[dict[str, Any]]:
    """40 rows of messages; those whose number is no multiple of 5 have a system turn: 80 %."""
    names = ("alice", "bob", "carol", "david", "eve")
    rows = []
    for number in range(40):
        turns = [{"role": "user", "content": f"{names[number % 5]} has {number} books ."}]
        if number % 5:
            turns.insert(0, {"role": "system", "content": "you count books ."})
        sides = {side: [{"role": "assistant", "content": text}] for side, text in SIDES.items()}
        rows.append({"prompt": turns, **sides})
    (tmp_path / "gemma.jinja").write_text(GEMMA_LIKE)
    return rows


SIDES = {"chosen": "seven", "rejected": "eight"}


def gemma_config(tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> ResolvedConfig:
    return file_config(
        tmp_path / "a.jsonl", rows, data={"on_bad_row": "drop", **data}, train={"pairs_per_step": 2},
        model={"path": "builtin:tiny", "chat_template": str(tmp_path / "gemma.jinja")},
    )  # fmt: skip


def test_held_out_pairs_are_drawn_from_what_the_template_takes(
    tmp_path: Path, system_rows: list[dict[str, Any]]
) -> None:
    """8 of 40 rows can be used: 3 are held out as asked for, 5 train, and the account adds up."""
    inputs = read_inputs(gemma_config(tmp_path, system_rows, eval_pairs=3))
    assert (len(inputs.held_out), len(inputs.train)) == (3, 5)
    assert all(pair.row % 5 == 0 for pair in (*inputs.train, *inputs.held_out))
    rows = inputs.account.training
    ((reason, lost),) = rows.dropped.items()
    assert reason == "the chat template refuses it (System role not supported)"
    assert sorted(lost) == [number for number in range(40) if number % 5]
    assert (rows.read, rows.num_dropped, rows.held_out, rows.trained) == (40, 32, 3, 5)
    assert inputs.account.held_out_rows == [pair.row for pair in inputs.held_out]
    path = f"{tmp_path}/a.jsonl"
    assert inputs.report[0] == f"{path}: 40 rows read"
    assert inputs.report[1] == f"  32 dropped because {reason} (rows 1, 2, 3, ...)"
    assert inputs.report[2:4] == [
        "  3 held out, 5 to train on",
        f"note: more than half of the data is lost: 32 of 40 rows of {path} are dropped (80%)",
    ]
    cure = "note: data.system=merge puts system turns into the user's, and the chat template takes such rows"
    assert sum(line.startswith(cure) for line in inputs.report) == 1


def test_a_system_turn_that_the_template_refuses_is_merged_or_dropped_where_that_is_asked_for(
    tmp_path: Path, system_rows: list[dict[str, Any]]
) -> None:
    for how, is_there in (("merge", True), ("drop", False)):
        inputs = read_inputs(gemma_config(tmp_path, system_rows, eval_pairs=3, system=how))
        assert (inputs.account.training.num_dropped, len(inputs.train)) == (0, 37)
        (pair,) = (pair for pair in (*inputs.train, *inputs.held_out) if pair.row == 1)
        prompt = inputs.tokenizer.decode(pair.chosen.input_ids[: pair.chosen.num_prompt])
        assert (prompt.count("books") == 2) == is_there
        assert "bob has" in prompt
        assert any("the system turn of 32 rows" in line for line in inputs.report)


def test_where_nothing_is_left_the_error_names_reason_and_cure(
    tmp_path: Path, system_rows: list[dict[str, Any]]
) -> None:
    path = f"{tmp_path}/a.jsonl"
    refused = [row for number, row in enumerate(system_rows) if number % 5]
    reason = "32 dropped because the chat template refuses it (System role not supported)"
    cure = "type data.system=merge to put the system turn into the user's, or model.chat_template=plain"
    assert fault(gemma_config(tmp_path, refused, eval_pairs=3)) == (
        f"data.path={path}: has 0 usable pairs ({reason}); give at least 2, one to hold out; or {cure}"
    )
    inputs = read_inputs(gemma_config(tmp_path, system_rows, eval_pairs=20))
    assert (len(inputs.held_out), len(inputs.train)) == (1, 7)
    assert any("data.eval_pairs=20: there are 8 usable pairs, so 1 of them" in line for line in inputs.report)


def test_a_draw_that_meets_bad_rows_draws_others(
    tmp_path: Path, system_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """data.train_pairs=2 of 8 usable rows: two train, and rows that nobody drew are not tokenised."""
    asked: list[int] = []
    whole = rcpo.data.tokenize.Tokeniser.__call__

    def counted(self: Any, records: Any) -> Any:
        asked.extend(record.row for record in records)
        return whole(self, records)

    monkeypatch.setattr(rcpo.data.tokenize.Tokeniser, "__call__", counted)
    inputs = read_inputs(gemma_config(tmp_path, system_rows, eval_pairs=1, train_pairs=2))
    assert (len(inputs.held_out), len(inputs.train)) == (1, 2)
    rows = inputs.account.training
    assert len(asked) == len(set(asked)) == rows.num_dropped + 3
    assert rows.read == rows.num_dropped + rows.undrawn + 3
