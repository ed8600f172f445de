"""Weights of pairs and KL-DRO in training runs: the plain loop's, however the batch is split.
`tests/method/test_composition.py` has what they are."""

import json
from typing import NamedTuple

import pytest

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import train_all
from helpers.same_run import assert_equal_rows, assert_equals_plain, metrics, plain_run
from helpers.selection import asked_for, matrix
from rcpo.config.resolved import ResolvedConfig
from rcpo.runs.folder import RunFolder
from rcpo.training.read_inputs import read_inputs

pytestmark = pytest.mark.ci("rows of matrices")


class Run(NamedTuple):
    case: Case
    words: tuple[str, ...]
    layout: Layout

    def __str__(self) -> str:
        told = "-".join(word.split(".")[-1].replace("=", "_") for word in self.words)
        return f"{self.case}-{told}-{self.layout}"


Runs = dict[Run, tuple[ResolvedConfig, RunFolder]]
DRO = ("objective.aggregate=kl_dro", "objective.dro_lambda=0.1", "objective.sample_weight=weight")
DORA = ("objective.sample_weight=dora", "objective.dora_a=0.25")
EXACT = ("calibration.every=2", "calibration.warmup_steps=0")
SPLITS = (Layout(1, 8), Layout(1, 1), Layout(2, 4), Layout(2, 1))
GROUPS = [
    [Run(Case("dpo", "off", "llama-tied", "adamw"), DRO, layout) for layout in SPLITS],
    [Run(Case("simpo", "exact", "neox", "adamw"), (*DRO, *EXACT), layout) for layout in SPLITS],
    [Run(Case("dpo", "off", "llama", "sgd"), DORA, layout) for layout in SPLITS],
    [
        Run(Case("simpo", "exact", "llama-tied", "adamw"), (*DORA, *EXACT), layout)
        for layout in (*SPLITS, Layout(2, 2, 3))
    ],
    [Run(Case("dpo", "on", "neox-tied", "adamw"), DRO, layout) for layout in (Layout(1, 4), Layout(2, 2, 3))],
]
"""Each group is one training, split in several ways."""
FIRST = {run: group[0] for group in GROUPS for run in group}
ALWAYS = [
    group[number] for idx, group in enumerate(GROUPS) for number in (0, min(1 + idx % 4, len(group) - 1))
]
"""One pass over the batch and another split of each."""
MIX = [Run(Case("mix", "off", "llama", "adamw"), DRO, layout) for layout in (Layout(1, 8), Layout(2, 1))]


def column(number: int) -> dict[str, float]:
    """Weights 0, 0.7, 1.4, 2.1 and probabilities 0.1 to 0.9 in turn."""
    return {"trust": round(0.7 * (number % 4), 1), "probability": round(0.1 + 0.2 * (number % 5), 1)}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Those of the selected tests, with what they are compared to."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    lines = (inputs / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) | column(number) for number, line in enumerate(lines)]
    (inputs / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    splits = [params["run"] for params in asked_for(request)]
    for run in dict.fromkeys([*splits, *(group[0] for group in GROUPS), *MIX]):
        columns = ["data.columns={weight: trust}"] if DRO[0] in run.words else []
        config = make_config(inputs, folder / str(run), run.case, run.layout, *run.words, *columns)
        made[run] = config, make_run(config)
    for num_ranks in (1, 2):
        mine = [folder for run, (_, folder) in made.items() if run.layout.ranks == num_ranks]
        train_all(mine, num_ranks, timeout_seconds=300)
    return made


@pytest.mark.timeout(700)
@pytest.mark.parametrize("run", matrix(FIRST, ALWAYS.__contains__, "rows of matrices"), ids=str)
def test_every_split_trains_as_the_plain_loop(run: Run, runs: Runs) -> None:
    """Weights to 1e-5 and every number to fp32 tolerance, also the loss, which is the aggregated one."""
    config, first = runs[FIRST[run]]
    assert_equals_plain(runs[run][1], plain_run(config), 1e-5)
    assert_equal_rows(metrics(runs[run][1]), metrics(first))


@pytest.mark.timeout(700)
def test_a_mix_is_the_same_on_one_rank_and_on_two(runs: Runs) -> None:
    one, two = (metrics(runs[run][1]) for run in MIX)
    assert_equal_rows(one, two)


@pytest.mark.timeout(700)
def test_the_weights_of_a_run_are_those_of_the_file(
    runs: Runs,
) -> None:
    """The plain loop takes them from the tokenised pairs, so they need a look of their own. With a = 1/4 and
    a_i = 1/2, p = 0.1 gives 1/(1/4 + 9/2) = 4/19."""
    config, run = runs[GROUPS[0][0]]
    assert {pair.row: pair.weight for pair in read_inputs(config).train} == {
        number: column(number)["trust"] for number in range(20)
    }
    dora = {pair.row: pair.weight for pair in read_inputs(runs[GROUPS[2][0]][0]).train}
    assert dora[0] == pytest.approx(4 / 19)
    assert dora[4] == pytest.approx(1 / (1 / 4 + 1 / 18))
    card = (run.final / "README.md").read_text()
    assert "Composed: each pair's loss times its weight in the data; 0.1 log mean exp(loss/0.1) in" in card
