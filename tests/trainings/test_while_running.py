"""What a run does with its evaluations: it ends early, keeps the best weights, warns, writes answers.

The same after a kill, on two ranks at ZeRO 3, and with an adapter. None of it moves a number of training."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import Job, do_jobs
from helpers.same_run import final_weights, metrics
from rcpo.config.conditions import parse_condition
from rcpo.runs.answers import read_answers
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.training.read_inputs import read_inputs

CASE = Case("dpo", "off", "llama", "sgd")
EVERY_STEP = ("train.eval_every=1", "train.save_every=3", "optim.lr=0.5")
STOP = "eval/displacement/margin > -0.5 and eval/logps/chosen < 0"
ON = (
    *EVERY_STEP, "metrics.answers=2", "metrics.answer_tokens=5", f"train.stop_when={STOP}",
    "name=stopped",
    "train.keep_best=min:eval/displacement/chosen", "tracking.alert_below=100",
)  # fmt: skip
REST = pytest.mark.ci("while a run lasts")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def made(inputs: Path, path: Path, *words: str, layout: Layout | None = None) -> RunFolder:
    return make_run(make_config(inputs, path, CASE, layout or Layout(1, 4), *words))


@pytest.fixture(scope="module")
def stopped(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = made(inputs, tmp_path_factory.mktemp("runs") / "stopped", *ON)
    do_jobs([Job(str(run.path))], 1, 300)
    return run


def best_step(run: RunFolder) -> int:
    """By hand: the first of the lowest chosen values behind the start."""
    return int(min(run.rows(run.eval)[1:], key=lambda row: (row["displacement/chosen"], row["step"]))["step"])


def greedy(model: Any, prompt: list[int], num_tokens: int, end: int) -> list[int]:
    """The likeliest tokens, by whole forward passes without a cache."""
    ids = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def assert_answers_are_greedy(run: RunFolder, step: int, place: Path) -> None:
    """Those of `step` are what the model in `place` says, those of the start what model.path says."""
    config = open_run(str(run.path))[1]
    pairs = read_inputs(config).held_out[:2]
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    models = [AutoModelForCausalLM.from_pretrained(each).eval() for each in (config.model.path, place)]
    known = [each for each in read_answers(run) if each.step == step]
    assert [each.pair for each in known] == [0, 1]
    for each, pair in zip(known, pairs, strict=True):
        prompt = pair.chosen.input_ids[: pair.chosen.num_prompt]
        answers = [
            tokenizer.decode(greedy(model, prompt, 5, tokenizer.eos_token_id), skip_special_tokens=True)
            for model in models
        ]
        assert [each.initial, each.now] == answers
        assert each.prompt == tokenizer.decode(prompt, skip_special_tokens=True)


def test_a_run_ends_at_the_first_evaluation_of_which_its_condition_holds(stopped: RunFolder) -> None:
    rows = stopped.rows(stopped.eval)
    holding = [row["step"] for row in rows if row["step"] and parse_condition(STOP).holds(row)]
    last = rows[-1]["step"]
    assert holding == [last]
    assert 1 < last < 6, "too early or too late to say anything"
    assert [row["step"] for row in metrics(stopped)] == list(range(1, last + 1))
    assert (stopped.checkpoints / f"step-{last:06d}" / "manifest.json").is_file()
    model = load_file(stopped.checkpoints / f"step-{last:06d}" / "model/model.safetensors")
    assert all(torch.equal(model[name], weight) for name, weight in final_weights(stopped).items())


def test_the_held_out_loss_is_dpos_of_the_pairs_results(stopped: RunFolder) -> None:
    """mean log(1 + exp(-0.1 (r_w - r_l))), r from the files of log-probs; log 2 at the start."""
    losses = []
    start = load_file(stopped.path / "eval/step-000000.safetensors")
    for row in stopped.rows(stopped.eval):
        z = load_file(stopped.path / f"eval/step-{row['step']:06d}.safetensors")
        margin = (z["z_w"] - start["z_w"]) - (z["z_l"] - start["z_l"])
        assert row["loss"] == pytest.approx(torch.log1p(torch.exp(-0.1 * margin)).mean().item(), rel=1e-5)
        losses.append(row["loss"])
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[-1] != losses[0]


def test_the_best_weights_are_those_of_their_step(stopped: RunFolder) -> None:
    """Of a step that is not the last."""
    step = best_step(stopped)
    known = stopped.read_run()["best"]
    row = next(row for row in stopped.rows(stopped.eval) if row["step"] == step)
    assert known == {"step": step, "key": "eval/displacement/chosen", "value": row["displacement/chosen"]}
    assert step == 3
    expected = load_file(stopped.checkpoints / f"step-{step:06d}" / "model/model.safetensors")
    kept = load_file(stopped.best / "model.safetensors")
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[name], weight) for name, weight in expected.items())
    card = (stopped.best / "README.md").read_text()
    value = f"{row['displacement/chosen']:.4g}"
    assert f"with the best eval/displacement/chosen: {value} at step {step}." in card
    assert 'from_pretrained("stopped/best")' in card


def test_the_answers_are_the_models_own_at_their_step(stopped: RunFolder) -> None:
    last = stopped.rows(stopped.eval)[-1]["step"]
    assert_answers_are_greedy(stopped, last, stopped.final)
    lines = [json.loads(line) for line in stopped.answers.read_text().splitlines()]
    assert [(line["step"], line["pair"]) for line in lines] == [
        (step, pair) for step in range(last + 1) for pair in (0, 1)
    ]


def test_the_alert_is_kept_in_run_json(stopped: RunFolder) -> None:
    row = stopped.rows(stopped.eval)[1]
    expected = {"step": 1, "displacement/chosen": row["displacement/chosen"]}
    assert stopped.read_run()["alert"] == expected


@REST
@pytest.mark.parametrize("killed_at", [("row", 2), ("checkpoint", 3), ("row", 4), ("export", 0)], ids=str)
def test_a_killed_run_ends_at_the_same_step_with_the_same_best(
    stopped: RunFolder, inputs: Path, tmp_path: Path, killed_at: Any
) -> None:
    """`export`: when all is done but final/; what is resumed then is at its last step already, and ends there
    again. The checkpoint of that step is written behind its evaluation."""
    run = made(inputs, tmp_path / "stopped", *ON)
    last = stopped.rows(stopped.eval)[-1]["step"]
    moment = (killed_at[0], killed_at[1] or last)
    do_jobs([Job(str(run.path), killed_at=moment), Job(str(run.path), resume=True)], 1, 300)
    assert repr(metrics(run)) == repr(metrics(stopped))
    assert run.eval.read_bytes() == stopped.eval.read_bytes()
    assert run.answers.read_bytes() == stopped.answers.read_bytes()
    for name in ("best", "alert"):
        assert run.read_run()[name] == stopped.read_run()[name]
    for folder in ("best", "final"):
        for file in (stopped.path / folder).iterdir():
            assert (run.path / folder / file.name).read_bytes() == file.read_bytes()


@REST
def test_nothing_of_it_moves_a_number(stopped: RunFolder, inputs: Path, tmp_path: Path) -> None:
    """Against the same run without, and with answers alone on two ranks at ZeRO 3."""
    plain = made(inputs, tmp_path / "plain", *EVERY_STEP)
    do_jobs([Job(str(plain.path))], 1, 300)
    last = stopped.rows(stopped.eval)[-1]["step"]
    assert repr(metrics(stopped)) == repr(metrics(plain)[:last])
    assert stopped.rows(stopped.eval) == plain.rows(plain.eval)[: last + 1]
    layout = Layout(2, 2, 3)
    sharded = [
        made(inputs, tmp_path / name, *EVERY_STEP, *words, layout=layout)
        for name, words in (("sharded", ()), ("answering", ON[len(EVERY_STEP) :]))
    ]
    do_jobs([Job(str(run.path)) for run in sharded], 2, 400)
    assert repr(metrics(sharded[1])) == repr(metrics(sharded[0])[:last])
    assert sharded[1].rows(sharded[1].eval) == sharded[0].rows(sharded[0].eval)[: last + 1]
    assert_answers_are_greedy(sharded[1], last, sharded[1].final)


@REST
def test_an_adapter_answers_as_it_is_and_is_merged_into_the_same_model(inputs: Path, tmp_path: Path) -> None:
    """Answers with the adapter on its base, and `rcpo export --merge`: plain transformers, the logits of the
    adapter's model to 1e-5."""
    from peft import AutoPeftModelForCausalLM

    from rcpo.cli import dispatch

    words = (
        "metrics.answers=2", "metrics.answer_tokens=5", "model.lora.rank=4", "model.lora.save=adapter",
        "optim.lr=3", "train.eval_every=3", "train.save_every=0",
    )  # fmt: skip
    run = made(inputs, tmp_path / "lora", *words)
    do_jobs([Job(str(run.path))], 1, 300)
    assert_answers_are_greedy(run, 6, run.final)
    run.update_run(inputs=None)
    assert dispatch(["export", str(run.path), str(tmp_path / "merged"), "--merge"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    adapted = AutoPeftModelForCausalLM.from_pretrained(run.final).eval()
    base = AutoModelForCausalLM.from_pretrained(inputs / "llama").eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        logits, expected, before = (model(ids).logits for model in (merged, adapted, base))
    assert (logits - expected).abs().max() < 1e-5
    assert (before - expected).abs().max() > 1e-3, "the adapter has no effect that could be lost"
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "merged into these weights" in card
    assert f'from_pretrained("{tmp_path / "merged"}")' in card
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w3 w36")["input_ids"] == [3, 36]
