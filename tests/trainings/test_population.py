"""metrics.population in whole trainings: against every pair of the vectors of a plain loop, on one and two
ranks and at every ZeRO stage."""

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.plain_loop import Sides, loss_and_incentives, summed
from helpers.rank_runs import train_all
from helpers.same_run import assert_equal_rows, metrics
from rcpo.config.resolved import ResolvedConfig
from rcpo.engine.engine import FEWEST_GRADIENTS
from rcpo.runs.folder import RunFolder
from rcpo.training.read_inputs import read_inputs

STEPS = 9
LAYOUTS = (Layout(1, 8, 0), Layout(1, 4, 1), Layout(2, 2, 2), Layout(2, 2, 3))
Runs = dict[tuple[str, Layout], tuple[ResolvedConfig, RunFolder]]
WORDS = ("metrics.geometry_every=1", "metrics.population=true", f"train.steps={STEPS}")


class Watched(NamedTuple):
    case: Case
    scope: str
    estimator: str


pytestmark = pytest.mark.ci("population")
FULL = Watched(Case("dpo", "off", "llama-tied", "adamw"), "full", "weighted")
HEAD = Watched(Case("simpo", "off", "llama", "adamw"), "head", "mean")
SGD = Watched(Case("dpo", "off", "neox", "sgd"), "full", "mean")
ALL = {"full": FULL, "head": HEAD, "sgd": SGD}
SPLITS = {"full": LAYOUTS[1:], "head": LAYOUTS[3:]}
"""What is compared with the first layout."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All of them, by one launch of one rank and one of two."""
    inputs: Path = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    folder: Path = tmp_path_factory.mktemp("runs")
    made = {}
    for name, (case, scope, estimator) in ALL.items():
        for layout in (LAYOUTS[0], *SPLITS.get(name, ())):
            words = (*WORDS, f"calibration.scope={scope}", f"calibration.estimator={estimator}")
            config = make_config(inputs, folder / f"{name}-{layout}", case, layout, *words)
            made[name, layout] = config, make_run(config)
    for num_ranks in (1, 2):
        mine = [run for (_, layout), (_, run) in made.items() if layout.ranks == num_ranks]
        train_all(mine, num_ranks, timeout_seconds=300)
    return made


class Seen(NamedTuple):
    """One step of the plain loop."""

    chosen: Tensor
    rejected: Tensor
    metric: Tensor | None
    """1/sqrt(second moment) before the step, its bias removed."""


def plain_steps(config: ResolvedConfig, watched: Watched) -> list[Seen]:
    """Both sides' vectors of every step of a plain training, fp64."""
    inputs = read_inputs(config)
    sampler = inputs.sampler(config)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, attn_implementation="eager").float()
    leaves = [model.get_output_embeddings().weight] if watched.scope == "head" else list(model.parameters())
    is_adam = watched.case.optimizer == "adamw"
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=config.optim.lr, eps=config.optim.eps, weight_decay=0)
        if is_adam
        else torch.optim.SGD(model.parameters(), lr=config.optim.lr)
    )
    with torch.no_grad():
        start = {idx: summed(model, [pair]) for idx, pair in enumerate(inputs.train)}
    seen = []
    for step in range(STEPS):
        indices = sampler.global_batch(step)
        batch = [inputs.train[idx] for idx in indices]
        ref = Sides(*(torch.cat([start[idx][side] for idx in indices]) for side in (0, 1)))
        z = summed(model, batch)
        leaf = Sides(z.z_w.detach(), z.z_l.detach())
        _, d_w, d_l = loss_and_incentives(watched.case.objective, leaf, ref, batch)
        weights = (d_w, d_l) if watched.estimator == "weighted" else (torch.ones_like(d_w),) * 2
        vectors = []
        for values, factors in zip(z, weights, strict=True):
            parts = torch.autograd.grad((factors * values).mean(), leaves, retain_graph=True)
            vectors.append(torch.cat([part.flatten() for part in parts]).double())
        metric = None
        if is_adam and step >= FEWEST_GRADIENTS:
            moments = torch.cat([optimizer.state[leaf]["exp_avg_sq"].flatten() for leaf in leaves]).double()
            metric = ((moments / (1 - 0.999**step)).sqrt() + 1e-12).reciprocal()
        seen.append(Seen(*vectors, metric))
        optimizer.zero_grad()
        (-d_w * z.z_w + d_l * z.z_l).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        optimizer.step()
    return seen


def products(seen: list[Seen], kind: str) -> list[float] | None:
    """Means over all pairs of steps, in the metric of the later one: |v_w|^2, |v_l|^2, <v_w, v_l>."""
    found = []
    for now, later in enumerate(seen):
        metric = later.metric if kind == "adam" else torch.ones_like(later.chosen)
        if metric is None:
            continue
        for before in seen[:now]:
            mixed = metric * (later.chosen * before.rejected + later.rejected * before.chosen) / 2
            same = (metric * later.chosen * before.chosen, metric * later.rejected * before.rejected)
            found.append([float(part.sum()) for part in (*same, mixed)])
    return [sum(column) / len(found) for column in zip(*found, strict=True)] if found else None


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", list(ALL))
def test_rows_are_of_all_pairs_of_steps(name: str, runs: Runs) -> None:
    """cosine, and the log of the two lengths that position or centre is; no Adam for SGD."""
    config, run = runs[name, LAYOUTS[0]]
    watched, rows = ALL[name], metrics(run)
    seen = plain_steps(config, watched)
    num_compared = {"population": 0, "adam": 0}
    for num, row in enumerate(rows, start=1):
        for kind, prefix in (("population", "population/"), ("adam", "population/adam_")):
            known = products(seen[:num], kind)
            assert (f"{prefix}cosine" in row) == (known is not None)
            if known is None or not (known[0] > 0 and known[1] > 0):
                continue
            num_compared[kind] += 1
            cosine = known[2] / math.sqrt(known[0] * known[1])
            assert row[f"{prefix}cosine"] == pytest.approx(cosine, rel=2e-3, abs=2e-3)
            log_norms = 0.5 * math.log(known[1] / known[0])
            of_lengths = row[f"{prefix}center"] if watched.estimator == "mean" else -row[f"{prefix}position"]
            assert of_lengths == pytest.approx(log_norms, rel=2e-3, abs=2e-3)
    assert rows[-1]["population/measurements"] == STEPS
    assert "population/cosine_lower" in rows[-1]
    assert num_compared["population"] >= 3
    assert (num_compared["adam"] >= 2) == (watched.case.optimizer == "adamw")


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", list(SPLITS))
def test_every_split_and_stage_sees_the_same_population(name: str, runs: Runs) -> None:
    first = metrics(runs[name, LAYOUTS[0]][1])
    for layout in SPLITS[name]:
        assert_equal_rows(first, metrics(runs[name, layout][1]))
