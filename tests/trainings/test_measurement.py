"""Every way to measure score geometry, against the plain loop: which gradients are read, on how many ranks,
at which ZeRO stage, and that measuring leaves alone what it must not touch."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.plain_loop import Sides, geometry_of, loss_and_incentives, summed
from helpers.rank_runs import train_all
from helpers.same_run import assert_equal_rows, assert_equals_plain, final_weights, metrics, plain_run
from helpers.selection import asked_for, matrix
from rcpo.config.schema import Config
from rcpo.models.adapters import last_block_parameters
from rcpo.models.load import load_model
from rcpo.runs.folder import RunFolder
from rcpo.training.read_inputs import read_inputs

NO_WARMUP = "calibration.warmup_steps=0"


class Measured(NamedTuple):
    """A training and the overrides that say how it is measured."""

    case: Case
    layout: Layout
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = "-".join(word.split(".")[-1].replace("=", "_") for word in self.words)
        return f"{self.case}-{self.layout}-{told}"


EXACT = Case("dpo", "exact", "llama-tied", "adamw")
SIMPO_EXACT = Case("simpo", "exact", "neox", "adamw")
EVERY_SECOND, SHORT_MEMORY = "calibration.every=2", "calibration.ema_beta=0.5"
EXACT_LAYOUTS = (
    Layout(1, 8, 0), Layout(1, 1), Layout(2, 4, 0), Layout(2, 1, 1), Layout(2, 2, 2), Layout(2, 2, 3),
)  # fmt: skip
ON = Case("dpo", "on", "llama", "adamw")
HEAD_WEIGHTED = ("calibration.estimator=weighted",)
CALIBRATED = [
    *(Measured(EXACT, layout, (NO_WARMUP, EVERY_SECOND)) for layout in EXACT_LAYOUTS),
    *(
        Measured(SIMPO_EXACT, layout, (NO_WARMUP, EVERY_SECOND, SHORT_MEMORY))
        for layout in (Layout(1, 2, 2), Layout(2, 1, 3))
    ),
    *(Measured(ON, layout, HEAD_WEIGHTED) for layout in (Layout(1, 4), Layout(2, 1, 3))),
    *(Measured(ON, layout, ("calibration.scope=full",)) for layout in (Layout(1, 4), Layout(2, 1, 3))),
    Measured(Case("ipo", "on", "neox-tied", "sgd"), Layout(2, 2, 2), HEAD_WEIGHTED),
]
"""Trainings whose alpha comes from what was measured."""

ALWAYS = [CALIBRATED[idx] for idx in (0, 3, 5, 9, 11)]
"""ZeRO 0 and 3, one and two ranks; scopes head and full, estimators mean and weighted."""

OFF = Case("dpo", "off", "llama-tied", "adamw")
GEOMETRY = ("metrics.geometry_every=2", "calibration.scope=full", "calibration.estimator=weighted")
LORA_LAST = ("model.lora.rank=3", "calibration.scope=lora_last")
OF_ADAPTERS = ("metrics.geometry_every=2", *LORA_LAST)
"""Of the last block's alone, by passes beside, while those of the block before train too."""
PLAIN_AND_WATCHED = [
    *(
        (Measured(OFF, layout), Measured(OFF, layout, GEOMETRY))
        for layout in (Layout(1, 2, 0), Layout(1, 4, 1), Layout(2, 2, 2), Layout(2, 2, 3))
    ),
    *(
        (Measured(OFF, layout, LORA_LAST), Measured(OFF, layout, OF_ADAPTERS))
        for layout in (Layout(1, 2, 0), Layout(1, 2, 1), Layout(2, 2, 2), Layout(2, 2, 3))
    ),
]
"""The same training without and with an eye on it."""


ADAPTERS = {
    estimator: [
        Measured(
            Case("simpo", "on", "neox", "adamw"), layout, (f"calibration.estimator={estimator}", *LORA_LAST)
        )
        for layout in (Layout(1, 8, 0), Layout(2, 1, 2), Layout(2, 2, 3))
    ]
    for estimator in ("mean", "weighted")
}
"""The last block's adapters, in every way to split the batch."""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Measured, tuple[Config, RunFolder]]:
    """All of them, by one launch of one rank and one of two."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    folder: Path = tmp_path_factory.mktemp("runs")
    made = {}
    asked = asked_for(request)
    calibrated = [params["measured"] for params in asked if "measured" in params]
    watched = [params[name] for params in asked for name in ("plain", "watched") if name in params]
    adapters = [one for params in asked if "estimator" in params for one in ADAPTERS[params["estimator"]]]
    for measured in [*calibrated, *watched, *adapters]:
        case, layout, words = measured
        config = make_config(inputs, folder / str(measured), case, layout, *words)
        made[measured] = config, make_run(config)
    for num_ranks in (1, 2):
        mine = [run for measured, (_, run) in made.items() if measured.layout.ranks == num_ranks]
        train_all(mine, num_ranks, timeout_seconds=300)
    return made


@pytest.mark.timeout(700)
@pytest.mark.parametrize("measured", matrix(CALIBRATED, ALWAYS.__contains__, "rows of matrices"), ids=str)
def test_a_measured_training_is_the_plain_loop(
    measured: Measured, runs: dict[Measured, tuple[Config, RunFolder]]
) -> None:
    """Weights to 1e-5; norms, cosine, alpha and every other number of every step to fp32 tolerance, against
    autograd through the whole model (full) or the head path (head). alpha has left 1, or its being right
    would say nothing."""
    config, run = runs[measured]
    assert_equals_plain(run, plain_run(config), 1e-5)
    assert abs(metrics(run)[-1]["calibration/alpha"] - 1) > 1e-3


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("plain", "watched"),
    matrix(
        PLAIN_AND_WATCHED,
        [PLAIN_AND_WATCHED[idx] for idx in (0, 3, 5)].__contains__,
        "rows of matrices",
    ),
    ids=[str(watched) for _, watched in PLAIN_AND_WATCHED],
)
def test_measuring_a_plain_training_changes_no_bit_of_it(
    plain: Measured, watched: Measured, runs: dict[Measured, tuple[Config, RunFolder]]
) -> None:
    """calibration=off with and without metrics.geometry_every: the same weights, bit for bit, and the same
    rows but for what was measured."""
    one, other = runs[plain][1], runs[watched][1]
    for name, weight in final_weights(one).items():
        assert torch.equal(weight, final_weights(other)[name]), name
    seen = [set(row) & {"score/cosine", "band/position", "dynamics/chosen_rate"} for row in metrics(other)]
    assert [len(found) for found in seen] == [3, 0, 3, 0, 3, 0]
    kept = [
        {key: row[key] for key in before} for before, row in zip(metrics(one), metrics(other), strict=True)
    ]
    assert kept == metrics(one)


@pytest.mark.timeout(700)
def test_every_stage_measures_the_same(runs: dict[Measured, tuple[Config, RunFolder]]) -> None:
    """The watched trainings of all stages and numbers of ranks that this session has: equal rows."""
    for words in (GEOMETRY, OF_ADAPTERS):
        of_words = [watched for _, watched in PLAIN_AND_WATCHED if watched.words == words]
        first, *others = [metrics(runs[watched][1]) for watched in of_words if watched in runs]
        for other in others:
            assert_equal_rows(first, other)


@pytest.mark.timeout(700)
@pytest.mark.parametrize("estimator", matrix(ADAPTERS, "weighted".__eq__, "rows of matrices"))
def test_the_last_blocks_adapters_are_measured(
    estimator: str, runs: dict[Measured, tuple[Config, RunFolder]]
) -> None:
    """Step 1 against autograd with respect to the adapters of the last block alone; all steps equal in every
    split and at every stage; alpha has left 1."""
    config, run = runs[ADAPTERS[estimator][0]]
    inputs = read_inputs(config)
    batch = [inputs.train[idx] for idx in inputs.sampler(config).global_batch(0)]
    torch.manual_seed(config.seed)
    model = load_model(config.model)
    z = summed(model, batch)
    weights = Sides(torch.ones(len(batch)), torch.ones(len(batch)))
    if estimator == "weighted":
        weights = Sides(*loss_and_incentives("simpo", Sides(z.z_w.detach(), z.z_l.detach()), z, batch)[1:])
    expected = geometry_of(z, weights, last_block_parameters(model))
    row = metrics(run)[0]
    for name, value in expected._asdict().items():
        assert row[f"score/{name}"] == pytest.approx(value, rel=1e-3)
    for other in ADAPTERS[estimator][1:]:
        assert_equal_rows(metrics(run), metrics(runs[other][1]))
    assert max(abs(row["calibration/alpha"] - 1) for row in metrics(run)) > 1e-3
