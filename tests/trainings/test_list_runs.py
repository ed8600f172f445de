"""Runs on lists of responses: whatever the order of a row, how a batch is split, and where a run was killed;
and the same lists as pairs."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from helpers.cases import NUM_STEPS, Case, Layout, make_config, make_run, write_inputs
from helpers.lists import PlainList, pl_dpo_loss, plain_step
from helpers.rank_runs import Job, do_jobs, train_all
from helpers.same_run import assert_equal_rows, final_weights, metrics
from helpers.tiny_models import VOCABULARY, make_llama
from rcpo.common.errors import UserError
from rcpo.data.pairs import TokenizedPair
from rcpo.runs.folder import RunFolder
from rcpo.training.read_inputs import read_inputs

PL = Case("pl_dpo", "exact", "llama-tied", "sgd")
EVERY_STEP = ("calibration.every=1", "calibration.warmup_steps=0", "train.save_every=2")


def write_lists(folder: Path, *, turned: bool = False) -> tuple[str, ...]:
    """Lists of 2 to 5 ragged responses, 14 to train on and 5 held out; `turned`: each the other way round.
    The words that read them. Each response has a probability, which is read where it is asked for."""
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
            likely = [(1 + (number + 3 * place) % 7) / 8 for place in range(len(texts))]
            row = {"responses": texts[order], "scores": scores[order], "probabilities": likely[order]}
            rows.append({"prompt": f"w{3 + number}", **row})
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
            r"objective=dpo: takes pairs, and the training data are lists .*; type data\.lists=best_worst ",
        ),
        (
            ("objective=pl_dpo", "data.unpair=true"),
            r"data\.unpair=true: takes pairs apart, and the data are ",
        ),
        (("data.responses=3",), r"data\.responses=3: is of data=arithmetic; .*; type data\.responses=2"),
    ):
        with pytest.raises(UserError, match=f"^{fault}"):
            read(*more)


def dora_of(rows: Sequence[dict[str, Any]]) -> list[float]:
    """At a = a_i = 1/2, where a response's weight is 2p: the mean over each row's responses."""
    return [2 * sum(row["probabilities"]) / len(row["probabilities"]) for row in rows]


@pytest.mark.ci("six short trainings")
@pytest.mark.parametrize("of", ["pair", "batch", "each"])
def test_weights_of_responses_are_inside_the_exponent_or_outside(of: str, tmp_path: Path) -> None:
    """Before the first update pl_dpo's loss of n responses is log n!. Of a step of all lists KL-DRO then is
    log mean e^(w log n!), mean(w) log mean n!, or of an exponent for each response the mean of lists' means.
    A split of the batch changes nothing."""
    write_inputs(tmp_path)
    how = "each" if of == "each" else "mean"
    words = (*write_lists(tmp_path), f"objective.sample_weight=dora_{how}", "objective.aggregate=kl_dro")
    words = (
        *words,
        f"objective.weight_of={of.replace('each', 'pair')}",
        "train.pairs_per_step=14",
        *EVERY_STEP,
    )
    runs = [
        make_run(make_config(tmp_path, tmp_path / f"run-{size}", PL, Layout(1, size), *words))
        for size in (14, 2)
    ]
    train_all(runs, 1, 200)
    rows = [json.loads(line) for line in Path(words[0].removeprefix("data.path=")).read_text().splitlines()]
    weights, losses = dora_of(rows), [math.lgamma(len(row["responses"]) + 1) for row in rows]
    inside = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
    if of == "each":
        of_lists = [
            [math.exp(2 * p * loss) for p in row["probabilities"]]
            for row, loss in zip(rows, losses, strict=True)
        ]
        inside = [math.log(sum(own) / len(own)) for own in of_lists]
    exponents, outside = (losses, sum(weights) / 14) if of == "batch" else (inside, 1.0)
    expected = outside * math.log(sum(map(math.exp, exponents)) / 14)
    assert metrics(runs[0])[0]["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert_equal_rows(metrics(runs[1]), metrics(runs[0]))
    whole = final_weights(runs[0])
    for name, weight in final_weights(runs[1]).items():
        torch.testing.assert_close(weight, whole[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.ci("two short trainings")
def test_lists_of_two_weigh_as_their_pairs(tmp_path: Path) -> None:
    """pl_dpo of lists of two and dpo of the same pairs, by the same probabilities: the same bits."""
    write_inputs(tmp_path)
    words: dict[str, list[str]] = {"pl_dpo": [], "dpo": []}
    for key, num in (("data.path", 14), ("data.eval_path", 5)):
        pairs = [
            {"prompt": f"w{3 + n}", "chosen": f" w{4 + n} w9", "rejected": f" w{5 + n}"}
            | {"probability_chosen": (1 + n) / 16, "probability_rejected": (15 - n) / 16}
            for n in range(num)
        ]
        lists = [
            {"prompt": row["prompt"], "responses": [row["rejected"], row["chosen"]], "scores": [0, 1]}
            | {"probabilities": [row["probability_rejected"], row["probability_chosen"]]}
            for row in pairs
        ]
        for name, own in (("dpo", pairs), ("pl_dpo", lists)):
            file = tmp_path / f"{key}-{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in own))
            words[name].append(f"{key}={file}")
    runs = []
    for name, own_words in words.items():
        case = Case(name, PL.calibration, PL.model, PL.optimizer)
        more = (*own_words, "objective.sample_weight=dora_product", *EVERY_STEP)
        runs.append(make_run(make_config(tmp_path, tmp_path / name, case, Layout(1, 4), *more)))
    train_all(runs, 1, 200)
    assert metrics(runs[0]) == metrics(runs[1])
    weights = final_weights(runs[1])
    assert all(torch.equal(weight, weights[name]) for name, weight in final_weights(runs[0]).items())


def plain_lists(slots: Sequence[TokenizedPair], num_slots: int) -> list[PlainList]:
    """Lists of packed slots, the best response first."""
    made = []
    for first in range(0, len(slots), num_slots):
        own = slots[first : first + num_slots]
        sides = [slot.chosen for slot in own] + [slot.rejected for slot in own[::-1]]
        scores = [slot.scores[0] for slot in own] + [slot.scores[1] for slot in own[::-1]]
        there = [idx for idx, side in enumerate(sides) if side.num_tokens]
        made.append(PlainList([sides[idx] for idx in there], [scores[idx] for idx in there]))
    return made


@pytest.mark.ci("three short trainings")
def test_a_reference_that_follows_is_the_plain_loop(tmp_path: Path) -> None:
    """pl_dpo with reference.sync_every=2: six steps by the reference of the moment, in one part, in parts of
    two lists, and with a live reference of the start; and the held-out loss."""
    write_inputs(tmp_path)
    case = Case("pl_dpo", "off", "llama", "sgd")
    words = (*write_lists(tmp_path), "reference.sync_every=2", "reference.sync_mix=0.4", "train.grad_clip=0")
    words = (*words, "optim.lr=0.05")
    configs = {
        name: make_config(tmp_path, tmp_path / name, case, Layout(1, size), *words, *more)
        for name, size, more in (("whole", 8, ()), ("split", 2, ()), ("live", 4, ("reference=live",)))
    }
    runs = {name: make_run(config) for name, config in configs.items()}
    train_all(list(runs.values()), 1, 200)
    inputs = read_inputs(configs["whole"])
    sampler, slots = inputs.sampler(configs["whole"]), inputs.train.slots
    policy, moving = make_llama(), make_llama()
    of_runs = {name: metrics(run) for name, run in runs.items()}
    for step in range(6):
        lists = plain_lists(inputs.train.take(sampler.global_batch(step)), slots)
        plain = plain_step(policy, moving, lists, pl_dpo_loss)
        for rows in of_runs.values():
            assert rows[step]["train/loss"] == pytest.approx(plain.loss, rel=1e-5)
        with torch.no_grad():
            for weight, up, down in zip(policy.parameters(), plain.up, plain.down, strict=True):
                weight -= 0.05 * (down - up)
            if (step + 1) % 2 == 0:
                for own, its in zip(moving.parameters(), policy.parameters(), strict=True):
                    own.copy_(0.6 * own + 0.4 * its)
    held_out = plain_step(policy, moving, plain_lists(inputs.held_out, inputs.held_out_slots), pl_dpo_loss)
    for name, run in runs.items():
        assert run.rows(run.eval)[-1]["loss"] == pytest.approx(held_out.loss, rel=1e-4)
        assert_equal_rows(of_runs[name], of_runs["whole"])
        weights = final_weights(run)
        for key, weight in policy.state_dict().items():
            torch.testing.assert_close(weights[key], weight, atol=1e-5, rtol=0, msg=key)
