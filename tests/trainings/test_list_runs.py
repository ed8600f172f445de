"""Runs on lists of responses: whatever the order of a row, how a batch is split, and where a run was killed;
and the same lists as pairs."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from helpers.cases import NUM_STEPS, Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import Job, do_jobs, train_all
from helpers.same_run import assert_equal_rows, final_weights, metrics
from helpers.tiny_models import VOCABULARY
from rcpo.common.errors import UserError
from rcpo.runs.folder import RunFolder
from rcpo.training.read_inputs import read_inputs

PL = Case("pl_dpo", "exact", "llama-tied", "sgd")
EVERY_STEP = ("calibration.every=1", "calibration.warmup_steps=0", "train.save_every=2")


def write_lists(folder: Path, *, turned: bool = False) -> tuple[str, ...]:
    """Lists of 2 to 5 ragged responses, 14 to train on and 5 held out; `turned`: each the other way round.
    The words that read them."""
    draw, words = random.Random(9), []
    for key, num in (("data.path", 14), ("data.eval_path", 5)):
        rows = []
        for number in range(num):
            texts = [
                " " + " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(draw.randint(1, 6)))
                for _ in range(2 + number % 4)
            ]
            scores = [draw.randint(0, 3) + place / 10 for place in range(len(texts))]
            order = slice(None, None, -1 if turned else 1)
            rows.append({"prompt": f"w{3 + number}", "responses": texts[order], "scores": scores[order]})
        file = folder / f"{key}-{turned}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words.append(f"{key}={file}")
    return tuple(words)


class Trained(NamedTuple):
    whole: RunFolder
    turned: RunFolder
    split: RunFolder
    killed: RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    inputs, folder = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("runs")
    write_inputs(inputs)
    own, turned = write_lists(inputs), write_lists(inputs, turned=True)
    runs = {}
    for name, words, layout in (
        ("whole", own, Layout(1, 8)),
        ("turned", turned, Layout(1, 8)),
        ("split", own, Layout(1, 2)),
        ("killed", own, Layout(1, 8)),
    ):
        config = make_config(inputs, folder / name, PL, layout, *words, *EVERY_STEP)
        runs[name] = make_run(config)
    jobs = [
        Job(str(run.path), killed_at=("row", 5) if name == "killed" else None) for name, run in runs.items()
    ]
    do_jobs(jobs, 1, 200)
    do_jobs([Job(str(runs["killed"].path), resume=True)], 1, 200)
    return Trained(**runs)


def assert_same_bits(run: RunFolder, other: RunFolder) -> None:
    assert metrics(run) == metrics(other)
    assert run.rows(run.eval) == other.rows(other.eval)
    weights = final_weights(other)
    for name, weight in final_weights(run).items():
        assert torch.equal(weight, weights[name]), name


def test_the_order_of_a_rows_responses_changes_no_bit(trained: Trained) -> None:
    assert len(metrics(trained.whole)) == NUM_STEPS
    assert_same_bits(trained.turned, trained.whole)


def test_micro_batches_change_nothing(trained: Trained) -> None:
    assert_equal_rows(metrics(trained.split), metrics(trained.whole))
    weights = final_weights(trained.whole)
    for name, weight in final_weights(trained.split).items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=0, msg=name)


def test_a_killed_run_is_the_run_that_was_not(trained: Trained) -> None:
    assert_same_bits(trained.killed, trained.whole)


def test_what_a_run_says_of_lists(trained: Trained) -> None:
    """Per-pair results are of the best and the worst response of each list; ranks up to the longest."""
    run = trained.whole
    first, *_, last = run.rows(run.eval)
    assert [key for key in last if "rank" in key] == [f"displacement/rank_{place}" for place in range(1, 6)]
    start, end = (
        load_file(run.pair_results / f"step-{row['step']:06d}.safetensors") for row in (first, last)
    )
    moved = [(end[name] - start[name]).double() for name in ("z_w", "z_l")]
    assert [len(each) for each in moved] == [5, 5]
    assert last["displacement/chosen"] == last["displacement/rank_1"] == pytest.approx(float(moved[0].mean()))
    assert last["displacement/rejected"] == pytest.approx(float(moved[1].mean()))
    assert 0 <= last["displacement/accuracy"] <= 1
    assert last["loss"] > 0
    (row, *_) = metrics(run)
    assert row["batch/chosen"] + row["batch/rejected"] >= 2 * 8
    assert row["calibration/alpha"] == 1


@pytest.mark.ci("two ranks")
def test_two_ranks_at_zero_2_train_the_same(trained: Trained, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    words = write_lists(tmp_path)
    run = make_run(make_config(tmp_path, tmp_path / "run", PL, Layout(2, 2, 2), *words, *EVERY_STEP))
    train_all([run], 2, 200)
    assert_equal_rows(metrics(run), metrics(trained.whole))


def test_lists_as_pairs_and_what_does_not_take_lists(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    words, case = write_lists(tmp_path), Case("dpo", "off", "llama", "sgd")

    def read(*more: str, objective: str = "dpo") -> tuple[int, int]:
        found = Case(objective, case.calibration, case.model, case.optimizer)
        inputs = read_inputs(make_config(tmp_path, tmp_path / "run", found, Layout(1, 8), *words, *more))
        return inputs.num_train, inputs.num_held_out

    assert read("data.lists=best_worst") == (14, 5)
    assert read("data.lists=all_pairs") == (4 * 1 + 4 * 3 + 3 * 6 + 3 * 10, 5)
    assert read(objective="pl_dpo") == (14, 5)
    for more, fault in (
        (
            (),
            r"objective=dpo: takes pairs, and the training data are lists .*; type data\.lists=best_worst or ",
        ),
        (
            ("objective=pl_dpo", "data.unpair=true"),
            r"data\.unpair=true: takes pairs apart, and the data are ",
        ),
        (("data.responses=3",), r"data\.responses=3: is of data=arithmetic; .*; type data\.responses=2"),
    ):
        with pytest.raises(UserError, match=f"^{fault}"):
            read(*more)
