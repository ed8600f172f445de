"""SIGKILL at random moments, then resume: the run that was never killed, bit for bit.

`RCPO_KILLS=60 pytest -m ci -s tests/trainings/test_kills.py` makes a long run of it and prints where they
fell, RCPO_KILLS_SEED other moments.
"""

import math
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import Job, do_jobs, seconds_file
from helpers.same_run import final_weights, metrics
from rcpo.runs.folder import RunFolder

NUM_KILLS = int(os.environ.get("RCPO_KILLS", "12"))
SEED = int(os.environ.get("RCPO_KILLS_SEED", "0"))
CASES = [
    (Case("dpo", "on", "llama-tied", "adamw"), Layout(1, 4, 1)),
    (Case("simpo", "exact", "llama", "adamw"), Layout(1, 4, 3)),
    (Case("bco", "feedback", "neox", "adamw"), Layout(1, 4, 0)),
    (Case("ipo", "on", "llama", "adamw"), Layout(2, 2, 2)),
]
WORDS = ("train.save_every=1", "train.eval_every=1", "metrics.population=true")
"""Mostly evaluations and checkpoints, so that kills fall into them."""


def where(run: RunFolder) -> str:
    """What a run was doing when it was killed, from what it left."""
    if (run.path / ".final.tmp").exists():
        return "export"
    if run.final.exists():
        return "end"
    if any(run.checkpoints.glob(".step-*")):
        return "checkpoint write"
    if not run.metrics.exists():
        return "start"
    steps = {name: len(run.rows(path)) for name, path in (("metrics", run.metrics), ("eval", run.eval))}
    return "evaluation" if steps["metrics"] == steps["eval"] and steps["metrics"] > 0 else "step"


@pytest.mark.timeout(max(600, 60 * NUM_KILLS))
@pytest.mark.parametrize(
    ("number", "num_kills"),
    [
        (0, 2),
        (3, 1),
        *(
            pytest.param(number, NUM_KILLS // len(CASES), marks=pytest.mark.ci("kills and resumes"))
            for number in range(len(CASES))
        ),
    ],
)
def test_killed_at_random_moments_and_resumed_equals_never_killed(
    tmp_path: Path, number: int, num_kills: int
) -> None:
    """The moments are drawn evenly over the length of a run but for its first quarter, which reads inputs and
    loads the model."""
    write_inputs(tmp_path)
    draw = random.Random(f"{SEED} {number}")
    case, layout = CASES[number]
    whole, *killed = (
        make_run(make_config(tmp_path, tmp_path / str(idx), case, layout, *WORDS))
        for idx in range(num_kills + 1)
    )
    job = Job(str(whole.path), killed_after_seconds=math.inf)
    do_jobs([job], layout.ranks, 200)
    length = float(seconds_file(job).read_text())
    at = [length * (0.25 + 0.75 * (idx + draw.random()) / num_kills) for idx in range(num_kills)]
    jobs = [Job(str(run.path), killed_after_seconds=moment) for run, moment in zip(killed, at, strict=True)]
    do_jobs(jobs, layout.ranks, 60 + 40 * num_kills)
    print(f"\n{case}, {layout}: {num_kills} kills: {dict(Counter(map(where, killed)))}")
    do_jobs([Job(str(run.path), resume=True) for run in killed], layout.ranks, 60 + 40 * num_kills)
    expected = final_weights(whole)
    for run in killed:
        assert repr(metrics(run)) == repr(metrics(whole)), run.path
        assert run.eval.read_bytes() == whole.eval.read_bytes(), run.path
        for name, weight in final_weights(run).items():
            assert torch.equal(weight, expected[name]), (run.path, name)
