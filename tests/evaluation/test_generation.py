"""`rcpo generate`: the files of other tools, both turns, what a kill leaves, prompts in every form."""

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rcpo import cli
from rcpo.builtin.make_tiny import CHAT_TEMPLATE
from rcpo.commands.generate import FORMATS, SETTINGS
from rcpo.common.errors import UserError
from rcpo.common.locks import hold
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.validate import validate
from rcpo.data.template import apply
from rcpo.evaluation import generation
from rcpo.evaluation.decoding import answer_all
from rcpo.evaluation.forms import markdown_counts
from rcpo.evaluation.prompts import Asking, Prompt, read_prompts
from rcpo.evaluation.subject import find_subject
from rcpo.models.load import model_place
from rcpo.records.arithmetic import problem_split
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree

QUESTION = "alice has three apples and gets four more . how many ?"
SECOND = "alice has seven apples and drops five of them . how many ?"
TINY = "builtin:tiny"


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", *words])
    assert stop.value.code == 0


def write(name: str, *lines: Any) -> str:
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"prompts={name}"


def test_alpaca_eval_reads_the_file(place: Path) -> None:
    """Its own reader, pandas' read_json of a .json file (alpaca_eval 0.6.6,
    utils.load_or_convert_to_dataframe), and the columns that its evaluate asks for: instruction, output and
    one generator."""
    import pandas as pd

    Path("set.json").write_text(
        json.dumps([{"instruction": QUESTION, "dataset": "helpful_base"}, {"instruction": SECOND}])
    )
    run(TINY, "prompts=set.json", "format=alpaca_eval", "out=outputs.json", "name=mine")
    table = pd.read_json("outputs.json")
    assert list(table["instruction"]) == [QUESTION, SECOND]
    assert list(table["output"]) == ["alice has seven apples now .", "alice has two apples now ."]
    assert set(table["generator"]) == {"mine"}
    assert table["dataset"][0] == "helpful_base"


def test_mt_bench_has_both_turns_in_the_order_of_questions(place: Path) -> None:
    """The keys that FastChat's gen_model_answer.py writes and its judge reads; the second answer is to the
    whole conversation."""
    run(
        TINY, "format=mt_bench", "out=mine.jsonl", "answers=2", "temperature=0.3",
        write("question.jsonl", {"question_id": 82, "turns": [SECOND, QUESTION]},
              {"question_id": 81, "category": "math", "turns": [QUESTION, SECOND]}),
    )  # fmt: skip
    found = rows(Path("mine.jsonl"))
    assert [row["question_id"] for row in found] == [81, 82]
    assert {key for row in found for key in row} == {
        "question_id",
        "answer_id",
        "model_id",
        "choices",
        "tstamp",
    }
    assert [choice["index"] for choice in found[0]["choices"]] == [0, 1]
    for row in found:
        for choice in row["choices"]:
            assert len(choice["turns"]) == 2
            assert all(isinstance(turn, str) for turn in choice["turns"])


def test_the_second_turn_is_asked_behind_the_first_answer(
    monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    seen: list[str] = []
    subject = find_subject(TINY)
    tokenizer = subject.tokenizer()

    def spy(model: Any, asked: Any, *rest: Any) -> Any:
        seen.extend(tokenizer.decode(each.ids) for each in asked)
        return answer_all(model, asked, *rest)

    monkeypatch.setattr(generation, "answer_all", spy)
    run(
        TINY,
        "format=mt_bench",
        "out=o.jsonl",
        write("q.jsonl", {"question_id": 1, "turns": [QUESTION, SECOND]}),
    )
    first = [{"role": "user", "content": QUESTION}]
    whole = [
        *first,
        {"role": "assistant", "content": "alice has seven apples now ."},
        {"role": "user", "content": SECOND},
    ]
    expected = [
        tokenizer.decode(tokenizer(apply(tokenizer, turns, True, {}))["input_ids"])
        for turns in (first, whole)
    ]
    assert seen == expected


def test_arena_hard_is_written_as_its_row_asks(place: Path) -> None:
    """2.0 for rows with uid: arena-hard-auto reads messages[-1]["content"]["answer"] by uid. 0.1 for rows
    with question_id: choices[0]["turns"][0]["content"]."""
    run(TINY, "format=arena_hard", "out=a.jsonl", write("q.jsonl", {"uid": "x1", "prompt": QUESTION}))
    (new,) = rows(Path("a.jsonl"))
    assert (new["uid"], new["model"]) == ("x1", "tiny")
    assert new["messages"] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": {"answer": "alice has seven apples now ."}},
    ]
    assert new["metadata"]["token_len"] == 6
    old_row = {"question_id": "y", "cluster": "c", "turns": [{"content": QUESTION}]}
    run(TINY, "format=arena_hard", "out=b.jsonl", write("old.jsonl", old_row))
    (old,) = rows(Path("b.jsonl"))
    assert (old["question_id"], old["model_id"]) == ("y", "tiny")
    assert old["choices"] == [{"index": 0, "turns": [{"content": "alice has seven apples now ."}]}]
    assert set(old["conv_metadata"]) == {"token_len", "header_count", "list_count", "bold_count"}


def test_markdown_is_counted_outside_of_code() -> None:
    counts = markdown_counts("# one\n## two\n- a\n* b\n1. c\n**bold** __too__\n```\n# not\n- not\n```\n")
    assert counts["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert counts["list_count"] == {"ordered": 1, "unordered": 2}
    assert counts["bold_count"] == {"**": 1, "__": 1}


class KilledError(Exception):
    pass


def test_a_generation_that_was_killed_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the second batch and in the middle of a line; the same words ask the rest alone, and the
    file is the one of a generation that was never killed."""
    prompts = [{"prompt": text} for text in (QUESTION, QUESTION, QUESTION, SECOND, QUESTION)]
    words = [TINY, write("q.jsonl", *prompts), "temperature=1.5", "batch=2", "answers=2"]
    run(*words, "out=whole.jsonl")
    num_asked: list[int] = []

    def dying(model: Any, asked: Any, *rest: Any) -> Any:
        num_asked.append(len(asked))
        for number, batch in enumerate(answer_all(model, asked, *rest)):
            if number == 2 and len(num_asked) == 1:
                raise KilledError
            yield batch

    monkeypatch.setattr(generation, "answer_all", dying)
    with pytest.raises(KilledError):
        cli.main(["generate", *words, "out=again.jsonl"])
    partial = Path("again.jsonl.partial")
    assert not Path("again.jsonl").exists()
    partial.write_text(partial.read_text() + '[4, 1, 0, "half')
    run(*words, "out=again.jsonl")
    assert num_asked == [10, 6]
    assert rows(Path("again.jsonl")) == rows(Path("whole.jsonl"))
    assert not partial.exists()
    texts = [row["response"] for row in rows(Path("whole.jsonl")) if row["prompt"][0]["content"] == QUESTION]
    assert len(set(texts)) > 1, "the same prompt twice has draws of its own"


def test_what_was_begun_with_other_words_is_not_gone_on_with(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write("q.jsonl", {"prompt": QUESTION})

    def dying(*rest: Any) -> Any:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(generation, "answer_all", dying)
        with pytest.raises(KilledError):
            cli.main(["generate", TINY, prompts, "out=o.jsonl"])
    assert Path("o.jsonl.partial").exists()
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", TINY, prompts, "out=o.jsonl", "seed=3"])
    assert stop.value.code == 2
    run(TINY, prompts, "out=o.jsonl", "seed=3", "--overwrite")


def test_a_file_that_is_being_written_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(Path("o.jsonl.lock")), pytest.raises(SystemExit) as stop:
        cli.main(["generate", TINY, write("q.jsonl", {"prompt": QUESTION}), "out=o.jsonl"])
    assert stop.value.code == 2
    assert "o.jsonl.partial: is being written by process " in capsys.readouterr().err
    run(TINY, "prompts=q.jsonl", "out=o.jsonl")
    assert sorted(path.name for path in place.iterdir()) == ["o.jsonl", "q.jsonl"]


@contextlib.contextmanager
def disk_that_fills_up(room: int) -> Iterator[None]:
    """No file of this process grows beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_was_generated(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full between two answers: one line, exit code 2. With room the same words ask for the others alone, and
    the file is that of a generation that nothing stopped."""
    problems = problem_split(0, 24, 0)[1]
    asked = write("q.jsonl", *({"prompt": each.prompt()} for each in problems))
    run(TINY, asked, "out=whole.jsonl")
    words = [TINY, asked, "out=o.jsonl", "batch=2"]
    capsys.readouterr()
    with disk_that_fills_up(800), pytest.raises(SystemExit) as stop:
        cli.main(["generate", *words])
    assert stop.value.code == 2
    assert not Path("o.jsonl").exists()
    kept = [json.loads(line) for line in Path("o.jsonl.partial").read_text().split("\n")[1:-1]]
    assert 0 < len(kept) < 24
    said = "cannot be written (File too large); make room and type the same words again"
    assert (
        capsys.readouterr().err == f"rcpo: o.jsonl.partial: {said}: {len(kept)} answers are there already\n"
    )
    seen: list[int] = []

    def counted(*rest: Any) -> Any:
        seen.append(len(rest[1]))
        return answer_all(*rest)

    monkeypatch.setattr(generation, "answer_all", counted)
    run(*words)
    assert seen == [24 - len(kept)]
    assert Path("o.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not Path("o.jsonl.partial").exists()


def test_held_out_prompts_are_the_rows_that_the_run_has_noted(place: Path) -> None:
    """A run of weighted pairs, which were drawn among those that its tokenizer could use: rows 5 and 1. One
    that has noted none is asked what its data give now."""
    texts = [problem.prompt() for problem in problem_split(0, 8, 3)[1]]
    pairs = [{"prompt": text, "chosen": "a", "rejected": "b", "w": 2.0} for text in texts]
    write("pairs.jsonl", *pairs)
    words = ["run_dir=run", "data=file", "data.path=pairs.jsonl", "data.eval_pairs=2", "tracking=none"]
    tree = compose([*words, "data.columns={weight: w}", "objective.sample_weight=weight"])
    assert tree is not None
    config, folder = resolve(validate(tree), None), RunFolder("run")
    folder.create(config, config_tree(config))
    shutil.copytree(model_place(TINY), folder.final)
    run("run", "prompts=held_out", "out=drawn.jsonl", "max_new_tokens=1")
    assert len(rows(Path("drawn.jsonl"))) == 2
    folder.update_run(rows={"held_out_rows": [5, 1]})
    run("run", "prompts=held_out", "out=noted.jsonl", "max_new_tokens=1")
    asked = [row["prompt"][-1]["content"] for row in rows(Path("noted.jsonl"))]
    assert asked == [texts[5], texts[1]]
    folder.update_run(rows={"held_out_rows": [5, 8]})
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "run", "prompts=held_out", "out=lost.jsonl"])
    assert stop.value.code == 2


def test_prompts_in_every_form_are_read(place: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    answer = {"role": "assistant", "content": "b"}
    write(
        "q.jsonl", "a", {"prompt": "a"}, {"instruction": "a"}, {"prompt": messages},
        {"messages": [*messages, answer]}, {"turns": ["a", "b"]}, {"turns": [{"content": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
    )  # fmt: skip
    asked = [(prompt.opening, prompt.later) for prompt in read_prompts(Path("q.jsonl"))]
    assert asked == [
        ("a", ()), ("a", ()), ("a", ()), (messages, ()), (messages, ()), ("a", ("b",)), ("a", ()),
        ([{"role": "user", "content": "a"}], ()),
    ]  # fmt: skip


def test_system_turns_are_as_in_training() -> None:
    tokenizer = find_subject(TINY).tokenizer()
    added = Asking(tokenizer, {}, system="be brief")
    assert added.conversation(Prompt("a"))[0] == {"role": "system", "content": "be brief"}
    merged = Asking(tokenizer, {}, system="be brief", keeps_system="merge")
    assert merged.conversation(Prompt("a")) == [{"role": "user", "content": "be brief\n\na"}]
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]
    assert added.conversation(Prompt(own)) == own


def test_an_answer_stops_at_what_training_ended_answers_with(tmp_path: Path) -> None:
    """A template that ends a turn with another token than generation ends with."""
    (tmp_path / "own.jinja").write_text(CHAT_TEMPLATE.replace("eos_token", "'<|user|>'"))
    asking = Asking(find_subject(TINY, chat_template=str(tmp_path / "own.jinja")).tokenizer(), {})
    user = asking.tokenizer.convert_tokens_to_ids("<|user|>")
    assert asking.stop_ids == sorted({3, user})


def test_every_setting_says_what_it_is() -> None:
    assert all(setting.text for setting in SETTINGS)
    assert next(setting.offered for setting in SETTINGS if setting.name == "format") == FORMATS
    with pytest.raises(UserError, match="is no run folder"):
        find_subject(TINY, step="3")
