"""Trainings on conversations: rows of messages against the same answers as prompt and completion, and as
pairs; and however a batch is split."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import train_all
from helpers.same_run import final_weights, metrics
from helpers.tiny_models import VOCABULARY
from rcpo.runs.folder import RunFolder

SFT = Case("sft", "off", "llama-tied", "sgd")
CHAT = ("model.chat_template=plain", "train.save_every=0")

pytestmark = pytest.mark.ci("trainings of 6 steps each")


def turns_of(draw: random.Random, num: int) -> list[dict[str, str]]:
    """`num` questions with their answers, of 1 to 5 words each."""
    said = [
        " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(draw.randint(1, 5)))
        for _ in range(2 * num)
    ]
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]


def write_rows(folder: Path, kind: str, longest: int) -> tuple[str, ...]:
    """The same conversations in one of three forms, 20 to train on and 6 held out, of up to `longest`
    answers; the words that read them."""
    draw, words = random.Random(5), []
    for key, num in (("data.path", 20), ("data.eval_path", 6)):
        rows: list[dict[str, Any]] = []
        for number in range(num):
            turns = turns_of(draw, 1 + number % longest)
            other = turns_of(draw, 1)[1:]
            if kind == "messages":
                rows.append({"messages": turns})
            elif kind == "completions":
                rows.append({"prompt": turns[:-1], "completion": turns[-1:]})
            else:
                rows.append({"prompt": turns[:-1], "chosen": turns[-1:], "rejected": other})
        file = folder / f"{key}-{kind}-{longest}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words.append(f"{key}={file}")
    return tuple(words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    inputs, folder = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("runs")
    write_inputs(inputs)
    runs = {
        kind: make_run(
            make_config(inputs, folder / kind, SFT, Layout(1, 4), *CHAT, *write_rows(inputs, kind, 1))
        )
        for kind in ("messages", "completions", "pairs")
    }
    long = write_rows(inputs, "messages", 3)
    for name, layout, words in (
        ("whole", Layout(1, 8), ()),
        ("split", Layout(1, 2), ()),
        ("packed", Layout(1, 4), ("train.packing=true",)),
    ):
        runs[name] = make_run(make_config(inputs, folder / name, SFT, layout, *CHAT, *long, *words))
    train_all(list(runs.values()), 1, 300)
    return runs


def test_chosen_answers_alone_train_bit_for_bit_whatever_their_form(trained: dict[str, RunFolder]) -> None:
    """Messages of one answer are its prompt and completion; of pairs with the same chosen responses the rows
    of the rejected ones make sums round otherwise."""
    ours, theirs = trained["messages"], trained["completions"]
    assert metrics(ours) == metrics(theirs)
    assert ours.rows(ours.eval) == theirs.rows(theirs.eval)
    weights = final_weights(ours)
    assert all(torch.equal(weight, weights[name]) for name, weight in final_weights(theirs).items())
    for mine, row in zip(metrics(ours), metrics(trained["pairs"]), strict=True):
        for key in ("train/loss", "displacement/chosen", "incentive/chosen", "train/grad_norm"):
            assert mine[key] == pytest.approx(row[key], rel=1e-5, abs=1e-5)
    for name, weight in final_weights(trained["pairs"]).items():
        torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=1e-5)


def test_a_conversation_trains_alike_however_its_batch_is_split_and_laid_out(
    trained: dict[str, RunFolder],
) -> None:
    whole = trained["whole"]
    for name in ("split", "packed"):
        for mine, row in zip(metrics(trained[name]), metrics(whole), strict=True):
            for key in ("train/loss", "displacement/chosen", "train/grad_norm"):
                assert mine[key] == pytest.approx(row[key], rel=1e-4, abs=1e-5)
    rows = whole.rows(whole.eval)
    assert rows[-1]["displacement/chosen"] > 0.1
    assert not any(key.endswith(("rejected", "accuracy", "margin")) for row in rows for key in row)
