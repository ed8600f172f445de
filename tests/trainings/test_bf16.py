"""Training in bfloat16: at every ZeRO stage, on one and two ranks, fp32 weights are stepped by gradients that
are added up in fp32; and displacement is 0 to the last bit while the weights are the initial ones.

The oracle is `helpers/plain_masters.py`, which does the same without an engine. What ranks and micro-batches
do not share is bf16's own rounding, which other shapes round otherwise.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

import rcpo.config.resolve
from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.masters import masters
from helpers.plain_masters import train_masters
from helpers.rank_runs import Job, do_jobs
from helpers.same_run import final_weights, metrics
from helpers.tiny_models import MODELS, SMALL, make_pairs
from rcpo.common.errors import UserError
from rcpo.data.batch import collate
from rcpo.models.policy import Policy
from rcpo.models.rounding import rounded_anew
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run

OF_BF16 = pytest.mark.ci("bf16")
STAGES = (0, 1, 2, 3)
WHOLE = [Layout(1, 8, stage) for stage in STAGES]
SPLIT = [*(Layout(1, 2, stage) for stage in STAGES), *(Layout(2, 2, stage) for stage in STAGES)]
"""The same micro-batches on one rank and on two."""
SGD, ADAM = Case("dpo", "off", "llama", "sgd"), Case("dpo", "off", "llama", "adamw")
RUNS = [*((SGD, layout) for layout in WHOLE + SPLIT), *((ADAM, layout) for layout in SPLIT)]
WORDS = ("model.dtype=bfloat16", "reference=live", "train.steps=4", "train.save_every=2")
OF_OPTIMIZER = {"sgd": ("train.grad_clip=0",), "adamw": ("train.grad_clip=0.3", "optim.eps=1e-12")}
SAME = 1e-5
"""Of SGD's first update by the same numbers in another order, relative. A sum that is rounded to bf16 on its
way is off by 1e-3."""
OTHER_ROUNDING = 0.05
"""Where a number is rounded otherwise: bf16 keeps 8 bits, and a weight that falls to the other side changes
the activations behind it. So do other shapes."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


class Trained:
    """A run, and the fp32 weights before and after each of its steps."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self.config = run, open_run(str(run.path))[1]
        self.masters = masters(masters_of(run))


def masters_of(run: RunFolder) -> Path:
    return Path(f"{run.path}.masters")


def train_in(inputs: Path, folder: Path, rows: list[tuple[Case, Layout]]) -> list[Trained]:
    runs = [
        make_run(
            make_config(
                inputs, folder / f"{case}-{layout}", case, layout, *WORDS, *OF_OPTIMIZER[case.optimizer]
            )
        )
        for case, layout in rows
    ]
    jobs = [Job(str(run.path), masters=str(masters_of(run))) for run in runs]
    for num_ranks in (1, 2):
        do_jobs(
            [job for job, (_, each) in zip(jobs, rows, strict=True) if each.ranks == num_ranks],
            num_ranks,
            200,
        )
    return [Trained(run) for run in runs]


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Case, Layout], Trained]:
    return dict(zip(RUNS, train_in(inputs, tmp_path_factory.mktemp("runs"), RUNS), strict=True))


def change(masters: list[dict[str, Tensor]], step: int) -> Tensor:
    """Of all weights since the start, one vector."""
    return torch.cat([(masters[step][name] - masters[0][name]).flatten() for name in sorted(masters[0])])


def assert_changes_agree(
    found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], first: float, later: float
) -> None:
    """|found - expected| / |expected| after the first step and after every later one."""
    assert len(found) == len(expected) > 1
    for step in range(1, len(found)):
        wanted = change(expected, step)
        off = float((change(found, step) - wanted).norm() / wanted.norm())
        assert off <= (first if step == 1 else later), f"step {step}: {off:.2g}"


@OF_BF16
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout", SPLIT, ids=str)
def test_the_first_update_is_the_learning_rate(
    layout: Layout, runs: dict[tuple[Case, Layout], Trained]
) -> None:
    """Adam's first update is lr g/|g|: 1.000 lr to .001. After a step on zeros it would be 0.744 lr:
    (1 - beta1)/(1 - beta1^2) over the root of the same of beta2."""
    trained = runs[ADAM, layout]
    moved = change(trained.masters, 1).abs() / trained.config.optim.lr
    is_met = moved > 0  # the embedding of a token that the batch does not have stays
    assert is_met.float().mean() > 0.9
    assert 0.999 <= float(moved[is_met].min()) <= float(moved.max()) <= 1.001


@OF_BF16
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("case", "layout"), RUNS, ids=str)
def test_every_stage_trains_as_the_plain_loop_with_fp32_weights(
    case: Case, layout: Layout, runs: dict[tuple[Case, Layout], Trained]
) -> None:
    """By the same micro-batches: the fp32 weights, what the model is given of them, and losses. Adam's
    gradients are clipped, SGD's first update is to SAME."""
    trained = runs[case, layout]
    expected, losses = train_masters(trained.config)
    assert_changes_agree(trained.masters, expected, SAME if case is SGD else OTHER_ROUNDING, OTHER_ROUNDING)
    rows = trained.run.rows(trained.run.metrics)
    assert [row["train/loss"] for row in rows] == pytest.approx(losses, abs=3e-3)
    assert min(row["train/grad_norm"] for row in rows) > trained.config.train.grad_clip
    final = final_weights(trained.run)
    assert all(torch.equal(weight, trained.masters[-1][name].bfloat16()) for name, weight in final.items())


@OF_BF16
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", STAGES)
def test_four_micro_batches_are_one(stage: int, runs: dict[tuple[Case, Layout], Trained]) -> None:
    """4 x 2 pairs and 1 x 8, whose z and gradients bf16 rounds otherwise."""
    whole, split = runs[SGD, Layout(1, 8, stage)], runs[SGD, Layout(1, 2, stage)]
    assert_changes_agree(split.masters, whole.masters, OTHER_ROUNDING, OTHER_ROUNDING)


TIED, BIASED = Case("dpo", "off", "llama-tied", "sgd"), Case("dpo", "off", "neox-tied", "sgd")


@OF_BF16
@pytest.mark.timeout(200)
def test_where_stages_round_otherwise(inputs: Path, tmp_path: Path) -> None:
    """At stage 0 both gradients of a tied weight are added in fp32, and not in bf16 first. At stage 3
    DeepSpeed has a linear layer of its own, which rounds before it adds the bias."""
    rows = [(TIED, Layout(2, 2, 0)), (BIASED, Layout(1, 4, 3))]
    for trained in train_in(inputs, tmp_path, rows):
        assert_changes_agree(
            trained.masters, train_masters(trained.config)[0], OTHER_ROUNDING, OTHER_ROUNDING
        )


@OF_BF16
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", [each for each in SPLIT if each.ranks == 2], ids=str)
def test_killed_and_resumed_is_never_killed(
    layout: Layout, inputs: Path, tmp_path: Path, runs: dict[tuple[Case, Layout], Trained]
) -> None:
    """Rows and weights, bit for bit; the fp32 weights come back from the checkpoint of step 2."""
    run = make_run(make_config(inputs, tmp_path / "run", ADAM, layout, *WORDS, *OF_OPTIMIZER["adamw"]))
    do_jobs([Job(str(run.path), killed_at=("row", 3)), Job(str(run.path), resume=True)], layout.ranks, 200)
    whole = runs[ADAM, layout].run
    assert metrics(run) == metrics(whole)
    expected = final_weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in final_weights(run).items())


@OF_BF16
@pytest.mark.timeout(200)
def test_stage_0_goes_on_with_more_ranks(
    inputs: Path, tmp_path: Path, runs: dict[tuple[Case, Layout], Trained]
) -> None:
    """Two ranks resume what one has begun: whole on every rank, nothing has to be converted."""
    run = make_run(
        make_config(inputs, tmp_path / "run", ADAM, Layout(1, 2, 0), *WORDS, *OF_OPTIMIZER["adamw"])
    )
    do_jobs([Job(str(run.path), killed_at=("row", 3))], 1, 100)
    config = run.config.read_text()
    run.config.write_text(config.replace("processes: 1", "processes: 2"))
    do_jobs([Job(str(run.path), resume=True, masters=str(masters_of(run)))], 2, 100)
    found, expected = masters(masters_of(run)), runs[ADAM, Layout(1, 2, 0)].masters[2:]
    for after, wanted in zip(found, expected, strict=True):
        for name, weight in after.items():
            torch.testing.assert_close(weight, wanted[name], atol=1e-4, rtol=0, msg=name)


@OF_BF16
@pytest.mark.timeout(200)
@pytest.mark.parametrize("stage", STAGES)
def test_population_and_calibration(stage: int, inputs: Path, tmp_path: Path) -> None:
    """In Adam's metric too, whose moments stage 0 keeps by the fp32 weights; a step whose numbers are not
    finite is left out."""
    case = Case("dpo", "exact", "llama-tied", "adamw")
    words = (*WORDS, "metrics.population=true", "train.steps=8", "train.on_nonfinite=skip")
    run = make_run(make_config(inputs, tmp_path / "run", case, Layout(2, 2, stage), *words))
    do_jobs([Job(str(run.path), lost_at=7)], 2, 200)
    rows = metrics(run)
    assert len(rows) == 8
    assert rows[6]["train/nonfinite_steps"] == 1
    assert 0.8 < rows[-1]["calibration/alpha"] < 1.25
    assert rows[-1]["population/measurements"] == 7
    assert {"population/cosine", "population/adam_cosine"} <= set(rows[-1])


def test_stage_0_without_its_torch_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Older:
        """A Tensor of torch 2.9."""

    monkeypatch.setattr(rcpo.config.resolve.torch, "Tensor", Older)
    with pytest.raises(
        UserError, match=r"^deepspeed\.stage=0: with model\.dtype=bfloat16 it needs torch 2\.10"
    ):
        make_config(inputs, tmp_path / "run", ADAM, Layout(1, 8, 0), *WORDS)
    make_config(inputs, tmp_path / "run", ADAM, Layout(1, 8, 1), *WORDS)


STILL = (
    "optim.lr=1e-30",
    "train.pairs_per_step=8",
    "train.steps=4",
    "train.eval_every=1",
    "model.dtype=bfloat16",
)
"""An update that changes no number: every step is the first one."""
KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "plain": ("dpo", "off", ()),
    "apart": ("dpo", "exact", ("calibration.every=2", "calibration.warmup_steps=0")),
    "probe": ("dpo", "feedback", ("calibration.feedback.source=probe", "calibration.feedback.pairs=3",
                                  "calibration.feedback.every=1")),
    "joined": ("simpo", "off", ("train.share_prefix=true", "model.attention=sdpa")),
    "tokens": ("ti_dpo", "off", ()),
    "adapter": ("dpo", "off", ("model.lora.rank=2",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(inputs: Path) -> Path:
    """A model of enough width for rounding to depend on the batch."""
    set_seed(1)
    config = LlamaConfig(**SMALL | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    LlamaForCausalLM(config).save_pretrained(inputs / "wide")
    AutoTokenizer.from_pretrained(inputs / "llama").save_pretrained(inputs / "wide")
    return inputs


@OF_BF16
@pytest.mark.timeout(200)
@pytest.mark.parametrize("reference", ["cached", "live"])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [*((kind, Layout(1, 2, 1)) for kind in KINDS), ("apart", Layout(2, 2, 3))],
    ids=str,
)
def test_displacement_is_0_at_step_0(
    kind: str, reference: str, layout: Layout, wide: Path, tmp_path: Path
) -> None:
    """In every row of trained and of held-out pairs, though evaluations, probes, micro-batches and measured
    steps all have batches of their own; and nothing calibrates."""
    objective, calibration, words = KINDS[kind]
    case = Case(objective, calibration, "wide", "adamw")
    config = make_config(wide, tmp_path / "run", case, layout, *STILL, f"reference={reference}", *words)
    run = make_run(config)
    do_jobs([Job(str(run.path))], layout.ranks, 100)
    for row in [*metrics(run)[:2], *run.rows(run.eval)]:
        for name in ("chosen", "rejected", "margin", "chosen_down", "both_down"):
            assert row[f"displacement/{name}"] == 0.0, (row["step"], name)
        assert row["displacement/accuracy"] == 0.5
    assert run.rows(run.eval)[-1]["displacement/noise_floor"] > 1e-3
    assert len(run.rows(run.eval)) == 5
    if kind == "probe":
        assert all(row["calibration/alpha"] == 1 for row in metrics(run))


@OF_BF16
@pytest.mark.parametrize("name", ["llama", "neox", "llama-tied"])
def test_the_noise_of_a_pair_is_what_rounding_does_to_it(name: str) -> None:
    """The error of r against fp32 arithmetic on the same bf16 weights, once they have moved, is what
    `rounded_anew` says before they have, to a factor of 1.5; other batches say next to nothing here."""
    model = MODELS[name]()
    pairs = make_pairs(48, seed=1, longest=20)

    def z(trained: PreTrainedModel, pairs_per_batch: int = 8) -> Tensor:
        parts = [pairs[at : at + pairs_per_batch] for at in range(0, len(pairs), pairs_per_batch)]
        with torch.no_grad():
            return torch.cat([Policy(trained)(collate(part, 0)).view(2, -1) for part in parts], 1)

    def root_mean_square(difference: Tensor) -> float:
        return float(difference.double().square().mean().sqrt())

    before, after = (copy.deepcopy(model).bfloat16() for _ in range(2))
    with torch.no_grad():
        for weight, moved in zip(model.parameters(), after.parameters(), strict=True):
            moved.copy_(weight + 1e-3 * torch.sign(torch.randn_like(weight)))
    start, end = z(before), z(after)
    exact = z(copy.deepcopy(after).float()) - z(copy.deepcopy(before).float())
    with rounded_anew(before):
        noise = root_mean_square(z(before) - start)
    assert torch.equal(z(before), start)
    assert 1 / 1.5 < noise / root_mean_square(end - start - exact) < 1.5
    assert root_mean_square(z(before, 1) - start) < 0.1 * noise
