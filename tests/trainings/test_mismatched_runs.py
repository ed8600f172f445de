"""Training runs whose objective needs mismatched pairs (kto with kl=mismatched): the plain loop's, on ranks
and in micro-batches, and a live reference as a cached one. `tests/trainings/test_resume.py` kills one."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers.cases import NUM_STEPS, Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import train_all
from helpers.same_run import assert_equal_rows, assert_equals_plain, final_weights, metrics, plain_run
from helpers.tiny_models import make_neox
from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.runs.folder import RunFolder
from rcpo.training.read_inputs import read_inputs

OFF, ON = Case("kto", "off", "llama-tied", "adamw"), Case("kto", "on", "neox", "sgd")
OTHER, ANOTHER = "other", "another"
"""In `reference.path`: folders of references of their own, against which z0 is above 0. Of the second one
every pair is scored alone, so that what is cached is too."""
PLACES = (OTHER, ANOTHER)
ALONE, LIVE = "reference.pairs_per_device=1", "reference=live"
SHORT = "train.max_length=12"
"""Cuts responses of mismatched pairs, and none of the data's own."""


class Run(NamedTuple):
    case: Case
    layout: Layout
    words: tuple[str, ...] = (OTHER,)

    def __str__(self) -> str:
        return "-".join([str(self.case), str(self.layout), *(word.split(".")[-1] for word in self.words)])


PLAIN = [
    Run(OFF, Layout(1, 8, 0)),
    Run(OFF, Layout(1, 2, 1)),
    Run(OFF, Layout(2, 2, 2)),
    Run(OFF, Layout(2, 2, 3), (OTHER, LIVE)),
    Run(OFF, Layout(2, 1, 1), (OTHER, "train.share_prefix=true")),
    Run(ON, Layout(1, 8, 0)),
    Run(ON, Layout(2, 2, 2)),
    Run(OFF, Layout(1, 4, 1), (OTHER, SHORT)),
    Run(OFF, Layout(1, 4, 1), (OTHER, "objective.aggregate=kl_dro", "objective.dro_lambda=0.1")),
]
"""Each the plain loop's."""
LORA = ("model.lora.rank=3",)
TWICE = [
    (OFF, Layout(1, 2, 0), (ANOTHER,)),
    (OFF, Layout(2, 2, 3), (ANOTHER,)),
    (OFF, Layout(2, 2, 2), LORA),
    (ON, Layout(1, 2, 1), ()),
]
"""Cached and live, every pair scored alone: the same bits."""
KINDS = ("reference=cached", LIVE)
Runs = dict[Run, tuple[ResolvedConfig, RunFolder]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    inputs, folder = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("runs")
    write_inputs(inputs)
    for name, seed in ((OTHER, 2), (ANOTHER, 4)):
        make_neox(seed=seed).save_pretrained(inputs / name)
        AutoTokenizer.from_pretrained(inputs / "neox").save_pretrained(inputs / name)
    both = [Run(case, layout, (*words, ALONE, kind)) for case, layout, words in TWICE for kind in KINDS]
    made = {}
    for number, run in enumerate([*PLAIN, *both]):
        words = [f"reference.path={inputs / word}" if word in PLACES else word for word in run.words]
        config = make_config(
            inputs, folder / str(number), run.case, run.layout, "objective.kl=mismatched",
            "train.save_every=6", *words,
        )  # fmt: skip
        made[run] = config, make_run(config)
    for num_ranks in (1, 2):
        train_all([run for key, (_, run) in made.items() if key.layout.ranks == num_ranks], num_ranks, 400)
    return made


def reference_point(run: RunFolder) -> float:
    """kto's z0 of the last step, as its checkpoint has it."""
    (newest,) = run.checkpoints.iterdir()
    (z0,) = json.loads((newest / "state.json").read_text())["objective_state"]
    return float(z0)


@pytest.mark.ci("rows of matrices")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("run", PLAIN, ids=str)
def test_every_split_trains_as_the_plain_loop(run: Run, runs: Runs) -> None:
    """Weights to 1e-5, every number of every step, and z0 itself, which is above 0."""
    config, trained = runs[run]
    plain = plain_run(config)
    assert_equals_plain(trained, plain, 1e-5)
    assert max(plain.reference_points) > 0.1
    assert reference_point(trained) == pytest.approx(plain.reference_points[-1], rel=1e-4, abs=1e-4)
    first = next(each for each in PLAIN if each.case == run.case)
    if run.words[1:] in ((), (LIVE,), ("train.share_prefix=true",)):
        assert_equal_rows(metrics(trained), metrics(runs[first][1]))


@pytest.mark.ci("rows of matrices")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("case", "layout", "words"), TWICE, ids=str)
def test_live_is_cached_bit_for_bit(case: Case, layout: Layout, words: tuple[str, ...], runs: Runs) -> None:
    """Every number of every step, the weights, and z0."""
    cached, live = (runs[Run(case, layout, (*words, ALONE, kind))][1] for kind in KINDS)
    assert len(metrics(live)) == NUM_STEPS
    assert metrics(live) == metrics(cached)
    assert reference_point(live) == reference_point(cached)
    assert reference_point(live) > 0
    expected = final_weights(cached)
    for name, weight in final_weights(live).items():
        assert torch.equal(weight, expected[name]), name
    kept = [load_file(run.reference) for run in (cached, live)]
    assert ["mismatched" in tensors for tensors in kept] == [True, False]


@pytest.mark.ci("rows of matrices")
def test_rows_longer_than_the_models_positions_are_refused(tmp_path: Path) -> None:
    """No row of the data is: prompts and responses of up to 41 tokens meet, in a model of 64."""
    write_inputs(tmp_path)
    rows = [{"prompt": "w3 " * 40 + "w4", "chosen": " w5", "rejected": " w6"}]
    rows += [{"prompt": "w3", "chosen": " w5" * 40, "rejected": " w6"}] * 7
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout, mismatched = Layout(1, 4), "objective.kl=mismatched"
    read_inputs(make_config(tmp_path, tmp_path / "mean", OFF, layout))
    read_inputs(make_config(tmp_path, tmp_path / "cut", OFF, layout, mismatched, "train.max_length=64"))
    with pytest.raises(UserError, match=r"^train\.max_length: the longest row has 8\d tokens, model\.path"):
        read_inputs(make_config(tmp_path, tmp_path / "refused", OFF, layout, mismatched))
