"""Invariant 9: a live reference trains as a cached one does, bit for bit where the same pairs go through it
together.

One process trains the runs of one rank, two those of two ranks. `reference.pairs_per_device=1` scores every
pair alone, before the run and within it. The cached runs of a model share one cache, so what one rank at ZeRO
0 has scored is compared with what two ranks at ZeRO 3 score live.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import train_all
from helpers.same_run import assert_equal_rows, final_weights, metrics
from helpers.selection import asked_for, matrix
from helpers.tiny_models import make_llama, make_neox
from rcpo.config.schema import Config, ModelConfig
from rcpo.data.batch import collate
from rcpo.models.policy import Policy
from rcpo.reference.cache import side_key, weights_fingerprint
from rcpo.runs.folder import RunFolder
from rcpo.training.read_inputs import read_inputs

pytestmark = pytest.mark.ci("live references")

LORA = ("model.lora.rank=3",)
OTHER = "other"
"""In `reference.path`: the folder of a reference of its own, another architecture even."""
CASES = {
    "plain": (Case("dpo", "on", "llama-tied", "adamw"), ()),
    "lora": (Case("dpo", "off", "llama-tied", "adamw"), LORA),
    "free": (Case("simpo", "off", "neox", "sgd"), ()),
    "tokens": (Case("ti_dpo", "on", "neox-tied", "adamw"), ()),
    "own": (Case("ipo", "off", "llama", "adamw"), (OTHER,)),
    "own-lora": (Case("dpo", "off", "llama", "adamw"), (OTHER, *LORA)),
    "own-tokens": (Case("ti_dpo", "off", "llama", "adamw"), (OTHER,)),
    "batches": (Case("dpo", "on", "of-batches", "adamw"), ()),
}
"""What is trained, with its further words."""
ONE, TWO = (Layout(1, 2, 0), Layout(1, 2, 3)), (Layout(2, 2, 0), Layout(2, 2, 3))
LAYOUTS = {
    "plain": ONE + TWO,
    "lora": ONE + TWO,
    "free": TWO[1:],
    "tokens": TWO[1:],
    "own": TWO[1:],
    "own-lora": (Layout(2, 2, 2),),
    "own-tokens": ONE[1:],
}
FEW = ("train.steps=3", "train.pairs_per_step=4", "train.eval_every=2")
SPLIT, SHARED = Layout(2, 1, 2), Layout(1, 4, 1)
ALONE = "reference.pairs_per_device=1"
PAIRED = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]


ALWAYS = {
    ("plain", TWO[1]),
    ("lora", ONE[0]),
    ("own", TWO[1]),
    ("tokens", TWO[1]),
    ("own-lora", Layout(2, 2, 2)),
}
"""A policy's own reference, one behind an adapter, one of its own weights, token by token; ZeRO 0, 2 and
3."""


class Runs:
    """All runs of this file that are asked for, trained."""

    def __init__(self, folder: Path, asked: set[tuple[str, Layout]]) -> None:
        self.folder = folder
        write_inputs(folder)
        self.other = folder / "reference"
        make_neox(seed=3).save_pretrained(self.other)
        make_llama(seed=5).save_pretrained(folder / "of-batches")
        for place in (self.other, folder / "of-batches"):
            AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(place)
        self.made: dict[tuple[str, Layout, str], tuple[Config, RunFolder]] = {}
        for name, layout in [pair for pair in PAIRED if pair in asked]:
            for kind in ("cached", "live"):
                self.add(name, layout, kind, ALONE)
        for kind in ("cached", "live"):
            self.add("batches", SPLIT, kind)
        self.add("batches", SHARED, "live", "train.share_prefix=true")
        for num_ranks in (1, 2):
            train_all([run for config, run in self.made.values() if config.world_size() == num_ranks],
                      num_ranks, 200)  # fmt: skip

    def add(self, name: str, layout: Layout, kind: str, *more: str) -> None:
        case, words = CASES[name]
        own = [f"reference.path={self.other}" if word is OTHER else word for word in words]
        place = self.folder / f"{name}-{layout}-{kind}"
        config = make_config(self.folder, place, case, layout, *FEW, *own, f"reference={kind}", *more)
        self.made[name, layout, kind] = config, make_run(config)

    def run(self, name: str, layout: Layout, kind: str) -> RunFolder:
        return self.made[name, layout, kind][1]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    asked = {(params["name"], params["layout"]) for params in asked_for(request) if "layout" in params}
    return Runs(tmp_path_factory.mktemp("live"), asked | ALWAYS)


@pytest.mark.timeout(450)
@pytest.mark.parametrize(("name", "layout"), matrix(PAIRED, ALWAYS.__contains__, "rows of matrices"), ids=str)
def test_live_is_cached_bit_for_bit(name: str, layout: Layout, runs: Runs) -> None:
    """Every number of every step and evaluation, and the weights after three steps of fp32."""
    cached, live = (runs.run(name, layout, kind) for kind in ("cached", "live"))
    assert len(metrics(live)) == 3
    assert metrics(live) == metrics(cached)
    assert live.rows(live.eval) == cached.rows(cached.eval)
    expected, weights = final_weights(cached), final_weights(live)
    assert weights.keys() == expected.keys()
    for key, weight in weights.items():
        assert torch.equal(weight, expected[key]), key


@pytest.mark.timeout(450)
def test_other_batches_agree_to_rounding(runs: Runs) -> None:
    """Scored in fours before the run, in micro-batches of one within it, and once with prompts shared: rows
    to fp32 tolerance, weights to 1e-5."""
    cached = runs.run("batches", SPLIT, "cached")
    for live in (runs.run("batches", SPLIT, "live"), runs.run("batches", SHARED, "live")):
        assert_equal_rows(metrics(cached), metrics(live))
        expected = final_weights(cached)
        for key, weight in final_weights(live).items():
            torch.testing.assert_close(weight, expected[key], atol=1e-5, rtol=0, msg=key)


@pytest.mark.timeout(450)
def test_a_live_reference_of_the_same_batch_is_the_policy_exactly(runs: Runs) -> None:
    """At step 1 both are the initial weights and see the same tensors: r = 0 to the last bit."""
    first = metrics(runs.run("batches", SPLIT, "live"))[0]
    assert (first["displacement/chosen"], first["displacement/rejected"]) == (0.0, 0.0)


def summed(folder: Path, config: Config, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """z of the pairs of the first step, or of the held-out ones, under a folder's model."""
    inputs = read_inputs(config)
    chosen = [inputs.train[idx] for idx in inputs.sampler(config).global_batch(0)]
    policy = Policy(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"))
    with torch.no_grad():
        z_w, z_l = policy(collate(chosen if which == "train" else inputs.held_out, 0)).chunk(2)
    return z_w, z_l


@pytest.mark.timeout(450)
@pytest.mark.parametrize("kind", ["cached", "live"])
def test_reference_path_is_the_objectives_and_the_start_is_evaluations(runs: Runs, kind: str) -> None:
    """Of the first batch, r is the distance of two models by plain transformers; of the held-out pairs it
    begins at 0, because displacement is what training does to the policy."""
    config, run = runs.made["own", TWO[1], kind]
    z_w, z_l = summed(runs.folder / "llama", config, "train")
    ref_w, ref_l = summed(runs.other, config, "train")
    assert (z_w - ref_w).abs().mean() > 1
    first = metrics(run)[0]
    torch.testing.assert_close(
        first["displacement/chosen"], float((z_w - ref_w).mean()), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        first["displacement/rejected"], float((z_l - ref_l).mean()), rtol=1e-4, atol=1e-5
    )
    start = load_file(run.reference)
    torch.testing.assert_close(start["held_out_w"], summed(runs.folder / "llama", config, "eval")[0])
    evaluations = run.rows(run.eval)
    assert evaluations[0]["displacement/chosen"] == 0.0
    assert evaluations[-1]["displacement/chosen"] != 0.0
    ends = zip(summed(runs.folder / "llama", config, "eval"), summed(runs.other, config, "eval"), strict=True)
    r_w, r_l = (z - ref for z, ref in ends)
    held_out = read_inputs(config).held_out
    sides = [
        [len(side.input_ids) - side.num_prompt for side in (one.chosen, one.rejected)] for one in held_out
    ]
    len_w, len_l = torch.tensor(sides).T
    ipo = (r_w / len_w - r_l / len_l - 5).square().mean()
    assert evaluations[0]["loss"] == pytest.approx(ipo.item(), rel=1e-5)


@pytest.mark.timeout(450)
def test_cached_rows_lie_under_the_weights_that_scored_them(runs: Runs) -> None:
    """One file for reference.path, one for each initial policy: training pairs in the former, held-out pairs
    in both, for the loss and as the start, which `own` shares with no other run."""
    config, _ = runs.made["own", TWO[1], "cached"]
    inputs = read_inputs(config)

    def keys(folder: Path) -> set[bytes]:
        name = weights_fingerprint(ModelConfig(path=str(folder), dtype="float32"))
        return {
            bytes(key)
            for key in load_file(runs.folder / "cache/reference" / f"{name}.safetensors")["keys"].numpy()
        }

    held_out = {side_key(side) for pair in inputs.held_out for side in (pair.chosen, pair.rejected)}
    first = inputs.train[inputs.sampler(config).global_batch(0)[0]]
    assert side_key(first.chosen) in keys(runs.other)
    assert held_out <= keys(runs.other)
    assert held_out == keys(runs.folder / "llama")
