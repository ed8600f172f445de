"""`engine=vllm`: what is refused before it starts, what is kept apart from transformers' answers, and, where
vLLM is installed, the same greedy answers as transformers'."""

import importlib.util
import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.adapters import write_sft_adapter
from helpers.compare_folders import compare, make_run
from helpers.lm_eval_tasks import write_task
from helpers.tiny_models import make_llama
from helpers.wide_heads import WIDTH, write_wide
from rcpo import cli
from rcpo.common.errors import UserError
from rcpo.comparison.downstream import read_downstream
from rcpo.comparison.forms import as_markdown
from rcpo.comparison.table import make_lines
from rcpo.evaluation.decoding import Answer, Asked, Decoding, Task, Writer, answer_all
from rcpo.evaluation.engines import ENGINES, TRANSFORMERS, VLLM, refuse_missing_engine
from rcpo.evaluation.results import FINAL, Results, Score, TaskResult
from rcpo.evaluation.subject import Subject, find_subject
from rcpo.evaluation.vllm_engine import lora_room, seed_of
from rcpo.models.load import model_place

TINY = "builtin:tiny"
QUESTION = "alice has three apples and gets four more . how many ?"


def failed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else original(name))


def test_without_vllm_one_line_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_vllm(monkeypatch)
    monkeypatch.chdir(tmp_path)
    said = (
        "rcpo: engine=vllm: vLLM is not installed; type pip install 'rcpo[vllm]', or leave engine=vllm out\n"
    )
    Path("q.jsonl").write_text(json.dumps({"prompt": QUESTION}) + "\n")
    assert failed(capsys, "generate", TINY, "prompts=q.jsonl", "out=o.jsonl", "engine=vllm") == said
    assert failed(capsys, "evaluate", TINY, "engine=vllm") == said
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]
    refuse_missing_engine(TRANSFORMERS)


@pytest.mark.parametrize(("entries", "room"), [({"r": 1}, 1), ({"r": 5}, 8), ({"r": 16}, 16),
                                               ({"r": 4, "rank_pattern": {"q_proj": 40}}, 64)])  # fmt: skip
def test_vllm_has_room_for_an_adapters_rank(tmp_path: Path, entries: dict[str, Any], room: int) -> None:
    assert lora_room(str(write_config(tmp_path, entries))) == room


def write_config(folder: Path, entries: dict[str, Any]) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **entries}))
    (folder / "adapter_model.safetensors").touch()
    return folder


def test_what_vllm_takes_no_adapter_of_is_said_with_what_to_type(tmp_path: Path) -> None:
    subject = Subject("mine", find_subject(TINY).model, str(write_config(tmp_path, {"r": 600})), engine=VLLM)
    with pytest.raises(UserError, match=r"has rank 600, and vLLM takes adapters up to 512; type rcpo export"):
        subject.in_vllm()


def test_every_answer_has_a_seed_of_63_bits() -> None:
    """sha256 of the empty text begins with e3b0c44298fc1c14."""
    assert seed_of("") == 0xE3B0C44298FC1C14 >> 1
    seeds = [seed_of(f"0 {answer} 0 0 x") for answer in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


class Counting(Writer):
    """Says how many tokens it was asked with, and how many it may write."""

    positions = 5

    def write(
        self, tasks: Sequence[Task], decoding: Decoding, stop_ids: Sequence[int], watched: Sequence[int]
    ) -> Iterator[dict[int, Answer]]:
        for task in tasks:
            yield {task.place: Answer([len(task.asked.ids), task.num_new], True)}


def test_another_engine_is_given_the_prompts_that_leave_room() -> None:
    """Five positions: prompts of 1, 5, 3 and 4 tokens leave 4, 0, 2 and 1, and no more than 3 are asked
    for."""
    asked = [Asked([7] * num) for num in (1, 5, 3, 4)]
    found: dict[int, Answer] = {}
    for batch in answer_all(Counting(), asked, Decoding(max_new_tokens=3), [2], pad_id=0):
        found |= batch
    assert [found[place].ids for place in range(4)] == [[1, 3], [], [3, 2], [4, 1]]


class Ending(Counting):
    ended = False

    def __enter__(self) -> "Ending":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True


def test_a_signal_ends_the_engine_before_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM would end this process at once, and leave vLLM's, which hold a GPU's memory."""
    before, engine = signal.getsignal(signal.SIGTERM), Ending()
    monkeypatch.setattr(Subject, "in_vllm", lambda subject: engine)
    with pytest.raises(KeyboardInterrupt), find_subject(TINY, engine=VLLM).writer():
        signal.raise_signal(signal.SIGTERM)
    assert engine.ended
    assert signal.getsignal(signal.SIGTERM) is before


def add_result(run: Path, engine: str | None, values: list[float]) -> None:
    made_with = {} if engine is None else {"engine": engine}
    questions = [{"id": str(number), "value": value} for number, value in enumerate(values)]
    Results(run).add(FINAL, "sums", TaskResult({"acc": Score(0.5, 0.1)}, 2, made_with), questions)


def test_results_say_their_engine_and_none_is_transformers(tmp_path: Path) -> None:
    for name, engine in (("old", None), ("new", TRANSFORMERS), ("other", VLLM)):
        (tmp_path / name).mkdir()
        add_result(tmp_path / name, engine, [0.0, 1.0])
    found = [read_downstream(tmp_path / name)["sums"].engine for name in ("old", "new", "other")]
    assert found == [TRANSFORMERS, TRANSFORMERS, VLLM]
    assert set(found) == set(ENGINES)


def test_scores_of_different_engines_are_not_subtracted(tmp_path: Path) -> None:
    """Two seeds of off and on; of the second, on was asked by vLLM: the difference is of the first alone."""
    values = {"off": [0.0, 0.0], "on": [1.0, 0.0]}
    for seed in (0, 1):
        for calibration, of_questions in values.items():
            engine = VLLM if (seed, calibration) == (1, "on") else TRANSFORMERS
            add_result(
                make_run(tmp_path / f"{calibration}-{seed}", "dpo", calibration, seed), engine, of_questions
            )
    comparison = compare(tmp_path)
    lines = make_lines(comparison)
    on = next(line.group for line in lines if line.group.calibration == "on")
    assert on.differences["downstream/sums"].num_seeds == 1
    said = as_markdown(lines, comparison)
    assert "downstream/sums: acc at the end." in said
    assert "downstream/sums: acc at the end, by vllm." in said


def test_answers_of_one_engine_are_not_gone_on_with_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.jsonl").write_text(json.dumps({"prompt": QUESTION}) + "\n")
    words = ["generate", TINY, "prompts=q.jsonl", "out=o.jsonl"]
    subject = find_subject(TINY)
    made_with = {"engine": TRANSFORMERS, "weights": subject.fingerprint}
    Path("o.jsonl.partial").write_text(json.dumps({"made_with": made_with}, sort_keys=True) + "\n")
    monkeypatch.setattr("rcpo.commands.generate.refuse_missing_engine", lambda engine: None)
    assert "was begun with other words, prompts or weights (other answers" in failed(capsys, *words)
    assert ", engine, " in failed(capsys, *words, "engine=vllm")


def needs_vllm() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")


@pytest.mark.ci("vLLM, where it is installed")
def test_wide_heads_are_the_same_function(tmp_path: Path) -> None:
    wide, ids = write_wide(tmp_path / "wide"), torch.arange(4, 40)[None]
    with torch.no_grad():
        logits = [model(ids).logits for model in (wide, find_subject(TINY).load())]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.ci("vLLM, where it is installed")
@pytest.mark.timeout(900)
def test_greedy_answers_are_those_of_transformers(tmp_path: Path) -> None:
    """A random Llama whose answers all differ: tokens, ends, and log-probabilities of watched tokens; drawn
    answers are those of their seeds, in any order."""
    needs_vllm()
    model = make_wide_llama(tmp_path / "model")
    asked = [
        Asked([4 + (7 * place + idx) % 33 for idx in range(1 + place)], str(place)) for place in range(8)
    ]
    subject = find_subject(str(tmp_path / "model"), engine=VLLM)
    greedy, drawn = Decoding(max_new_tokens=8), Decoding(temperature=1.0, max_new_tokens=8)
    with subject.writer() as writer:
        theirs = in_order(writer, asked, greedy, watched=[5, 9])
        draws = in_order(writer, asked, drawn)
        backwards = in_order(writer, asked[::-1], drawn)
    ours = in_order(model, asked, greedy, watched=[5, 9])
    assert [answer.ids for answer in theirs] == [answer.ids for answer in ours]
    assert [answer.is_finished for answer in theirs] == [answer.is_finished for answer in ours]
    assert len({tuple(answer.ids) for answer in ours}) > 5
    watched = [torch.tensor([answer.watched for answer in each]) for each in (theirs, ours)]
    torch.testing.assert_close(*watched, atol=1e-4, rtol=1e-4)
    assert draws == backwards[::-1]
    assert draws != [answer._replace(watched=()) for answer in theirs]


@pytest.mark.ci("vLLM, where it is installed")
@pytest.mark.timeout(900)
def test_an_adapter_beside_its_base_answers_as_merged(tmp_path: Path) -> None:
    needs_vllm()
    make_wide_llama(tmp_path / "llama")
    adapter = write_sft_adapter(tmp_path / "llama", tmp_path / "adapter")
    asked = [Asked([4 + (5 * num + idx) % 33 for idx in range(1 + num)]) for num in range(8)]
    ours = in_order(find_subject(str(adapter)).load(), asked, Decoding(max_new_tokens=8), watched=[5, 9])
    with find_subject(str(adapter), engine=VLLM).writer() as writer:
        theirs = in_order(writer, asked, Decoding(max_new_tokens=8), watched=[5, 9])
    assert [answer.ids for answer in theirs] == [answer.ids for answer in ours]
    watched = [torch.tensor([answer.watched for answer in each]) for each in (theirs, ours)]
    torch.testing.assert_close(*watched, atol=1e-4, rtol=1e-4)


@pytest.mark.ci("vLLM, where it is installed")
@pytest.mark.timeout(900)
def test_commands_say_the_engine_and_score_as_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word problems and a task of lm-eval's, asked of the model that ships, through vLLM and through
    transformers; the answers' file says which."""
    needs_vllm()
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.chdir(tmp_path)
    write_wide(Path("wide"))
    write_task(tmp_path / "tasks")
    words = ["evaluate", "wide", "tasks=arithmetic,sums", "tasks_dir=tasks"]
    said = {engine: succeeded(capsys, *words, f"engine={engine}").splitlines() for engine in ENGINES}
    assert "wide final: arithmetic, by vllm" in said[VLLM]
    assert said[VLLM][-1] == said[TRANSFORMERS][-1]
    words = ["generate", "wide", "prompts=arithmetic", "max_new_tokens=16"]
    succeeded(capsys, *words, "out=v.jsonl", "engine=vllm")
    succeeded(capsys, *words, "out=t.jsonl")
    theirs, ours = ([json.loads(line) for line in Path(name).read_text().splitlines()]
                    for name in ("v.jsonl", "t.jsonl"))  # fmt: skip
    assert theirs == [line | {"engine": VLLM} for line in ours]


def succeeded(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 0
    return capsys.readouterr().out


def make_wide_llama(folder: Path) -> Any:
    """A random Llama with the tokenizer of the model that ships, and heads that vLLM takes."""
    model = make_llama()
    shutil.copytree(model_place(TINY), folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder / "narrow")
    assert model.config.head_dim < WIDTH
    wide = write_wide(folder / "wide", folder / "narrow")
    for file in [*(folder / "wide").iterdir(), *(folder / "tokenizer").glob("token*")]:
        shutil.copy2(file, folder)
    return wide


def in_order(model: Any, asked: list[Asked], decoding: Decoding, watched: Sequence[int] = ()) -> list[Answer]:
    found: dict[int, Answer] = {}
    for batch in answer_all(model, asked, decoding, [2, 3], 0, watched):
        found |= batch
    return [found[place] for place in range(len(asked))]
