"""Run folders with numbers of the test's choice, written by rcpo's own writers, without any training."""

import copy
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from rcpo.comparison.find import find_runs
from rcpo.comparison.groups import Comparison, compare_runs
from rcpo.comparison.load import load_run
from rcpo.config.compose import compose
from rcpo.config.validate import validate
from rcpo.data.pairs import SideLogProbs
from rcpo.method.metrics import displacement_row
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree
from rcpo.runs.rows import encode_row

START = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-2.0, -2.0, -2.0, -2.0]])
"""z_w and z_l of four held-out pairs before training."""


@functools.cache
def default_tree() -> dict[str, Any]:
    tree = compose([])
    assert tree is not None
    return config_tree(validate(tree))


def make_run(
    path: Path,
    objective: str = "dpo",
    calibration: str = "off",
    seed: int = 0,
    *,
    change: Sequence[Sequence[float]] = ((-1.0, 1.0, 2.0, -4.0), (-2.0, -2.0, -2.0, -2.0)),
    start: torch.Tensor = START,
    settings: dict[str, Any] | None = None,
    status: str = "done",
    steps: int = 8,
    band: bool = True,
    with_pairs: bool = True,
    noise: float | None = None,
    at_end: dict[str, float] | None = None,
    **run_json: Any,
) -> Path:
    """A run of `steps` steps, evaluated at the start, in the middle and at the end, where the log-probs of
    the pairs have changed by `change` (chosen, rejected); in proportion to the step. `noise`: of a bf16
    run; `at_end`: more of the last evaluation."""
    run = RunFolder(path)
    tree = copy.deepcopy(default_tree())
    tree["objective"] = {"name": objective, **({"beta": 0.1} if objective == "dpo" else {})}
    tree["calibration"]["name"] = calibration
    tree |= {"seed": seed, "run_dir": str(path), "name": path.name}
    for key, value in (settings or {}).items():
        *sections, last = key.split(".")
        inside = tree
        for section in sections:
            inside = inside[section]
        inside[last] = value
    run.pair_results.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(tree, sort_keys=False))
    run.update_run(status=status, **run_json)
    rows = [step_row(step, band, alpha=1.0 if calibration == "off" else 1.2) for step in range(1, steps + 1)]
    run.metrics.write_text("".join(encode_row(row) + "\n" for row in rows))
    evaluations = []
    for step in sorted({0, steps // 2, steps}):
        z_w, z_l = start + step / steps * torch.tensor(change)
        evaluations.append({"step": step} | displacement_row(z_w, z_l, *start, noise=noise))
        if with_pairs:
            run.save_pair_results(step, SideLogProbs(z_w, z_l))
    evaluations[-1] |= at_end or {}
    run.eval.write_text("".join(encode_row(row) + "\n" for row in evaluations))
    return path


def step_row(step: int, band: bool, alpha: float) -> dict[str, float]:
    """Position 0.1 a step; the band is [-0.25, 0.25] at even steps and open (rho < 0) at odd ones."""
    row = {
        "step": step,
        "displacement/chosen": -0.1 * step,
        "calibration/alpha": alpha,
        "speed/pairs_per_second": 100.0 + step,
        "speed/peak_memory_gb": 0.5,
    }
    if band:
        edge = 0.25 if step % 2 == 0 else math.inf
        row |= {
            "score/cosine": 0.5 if step % 2 == 0 else -0.5,
            "band/position": 0.1 * step,
            "band/center": 0.0,
            "band/lower": -edge,
            "band/upper": edge,
            "band/inside": float(0.1 * step <= edge),
            "dynamics/pathway": float(step % 4),
        }
    return row


def compare(path: Path) -> Comparison:
    return compare_runs([load_run(run) for run in find_runs([str(path)])])
