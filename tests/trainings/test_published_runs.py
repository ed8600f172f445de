"""calibration=published with DeepSpeed, on one rank and on two: alphas and weights of the recursion in plain
torch, of each rank by itself."""

from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.plain_published import PublishedRun, train_published
from helpers.rank_runs import train_all
from helpers.same_run import final_weights, metrics
from helpers.selection import asked_for, matrix
from rcpo.config.resolved import ResolvedConfig
from rcpo.engine.engine import build_optimizer
from rcpo.models.adapters import last_block_parameters
from rcpo.models.load import load_model
from rcpo.runs.folder import RunFolder
from rcpo.training.read_inputs import read_inputs

MEAN = "objective.log_probs=mean"


class Published(NamedTuple):
    case: Case
    layout: Layout
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join([str(self.case), str(self.layout), *(word.split(".")[-1] for word in self.words)])


CPO, DPO = Case("cpo", "published", "llama-tied", "adamw"), Case("dpo", "published", "neox", "adamw")
RUNS = [
    Published(CPO, Layout(1, 2, 0)),
    Published(CPO, Layout(1, 4, 3)),
    Published(DPO, Layout(2, 1, 1)),
    Published(CPO, Layout(2, 2, 3)),
    Published(DPO, Layout(2, 2, 2), ("train.share_prefix=true",)),
    Published(DPO, Layout(2, 2, 2), ("model.lora.rank=3",)),
    Published(DPO, Layout(1, 2, 1), ("model.lora.rank=3", "model.gradient_checkpointing=true")),
]
ALWAYS = [RUNS[idx] for idx in (0, 3, 5, 6)]
"""Head and adapters; ZeRO 0 to 3; one rank and two."""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Published, tuple[ResolvedConfig, RunFolder]]:
    inputs, folder = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("runs")
    write_inputs(inputs)
    made = {}
    for published in [params["published"] for params in asked_for(request)]:
        case, layout, words = published
        config = make_config(inputs, folder / str(published), case, layout, MEAN, *words)
        made[published] = config, make_run(config)
    for num_ranks in (1, 2):
        train_all([run for key, (_, run) in made.items() if key.layout.ranks == num_ranks], num_ranks, 300)
    return made


def plainly(config: ResolvedConfig) -> tuple[PublishedRun, dict[str, torch.Tensor]]:
    """The oracle's run of a config, and the weights that it saves."""
    inputs = read_inputs(config)
    sampler, ranks = inputs.sampler(config), config.world_size()
    steps = [
        [
            [
                [inputs.train[idx] for idx in indices]
                for indices in sampler.micro_batches(step, rank, ranks, config.train.pairs_per_device)
            ]
            for rank in range(ranks)
        ]
        for step in range(inputs.num_steps(config))
    ]
    torch.manual_seed(config.seed)
    with_adapter = config.model.lora.rank is not None
    model = (
        load_model(config.model)
        if with_adapter
        else AutoModelForCausalLM.from_pretrained(config.model.path, attn_implementation="eager").float()
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    run = train_published(
        model, steps, config.objective["name"], build_optimizer(config.optim, trained),
        config.train.grad_clip, config.calibration.ema_beta, last_block_parameters if with_adapter else None,
    )  # fmt: skip
    return run, {} if with_adapter else dict(model.named_parameters())


@pytest.mark.timeout(500)
@pytest.mark.parametrize("published", matrix(RUNS, ALWAYS.__contains__, "rows of matrices"), ids=str)
def test_every_rank_has_its_own_recursion(
    published: Published, runs: dict[Published, tuple[ResolvedConfig, RunFolder]]
) -> None:
    """calibration/alpha of every step is the mean over micro-batches and ranks, the averages those over
    ranks; weights to 1e-5."""
    config, run = runs[published]
    expected, weights = plainly(config)
    assert len(metrics(run)) == len(expected.alphas)
    for row, alphas, emas in zip(metrics(run), expected.alphas, expected.emas, strict=True):
        flat = [alpha for of_rank in alphas for alpha in of_rank]
        assert row["calibration/alpha"] == pytest.approx(sum(flat) / len(flat), rel=2e-4)
        for name, place in (("position_ema", 0), ("center_ema", 1)):
            mean = sum(ema[place] for ema in emas) / len(emas)
            assert row[f"calibration/{name}"] == pytest.approx(mean, abs=1e-4)
    assert max(abs(row["calibration/alpha"] - 1) for row in metrics(run)) > 1e-2
    saved = final_weights(run)
    for name, weight in weights.items():
        if name in saved:
            torch.testing.assert_close(saved[name], weight.detach(), atol=1e-5, rtol=0, msg=name)
