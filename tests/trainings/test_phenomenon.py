"""The embedded default shows displacement and its cure: the four runs of README, through the real command."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from helpers import forked
from helpers.selection import asked_for, matrix

RUNS = [(objective, calibration) for objective in ("dpo", "simpo") for calibration in ("off", "on")]
FALLS_BY_NATS = {"dpo": 1.0, "simpo": 0.5}
"""What plain training costs the held-out chosen responses at least."""


@pytest.fixture(scope="module")
def evaluations(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """eval.jsonl of each run at its defaults."""
    folder: Path = tmp_path_factory.mktemp("runs")
    env = os.environ | {"RCPO_CACHE": str(folder / "cache")}
    asked = {params["objective"] for params in asked_for(request)}
    lines = {
        f"{objective}-{calibration}": [
            "train", f"objective={objective}", f"calibration={calibration}", "tracking=none",
            "train.device=cpu", f"run_dir={objective}-{calibration}",
        ]
        for objective, calibration in RUNS
        if objective in asked
    }  # fmt: skip
    done = forked.rcpo_all(lines, cwd=folder, env=env)
    assert all(each.returncode == 0 for each in done.values()), done
    return {
        tuple(name.split("-")): [json.loads(row) for row in (folder / name / "eval.jsonl").open()]
        for name in lines
    }


@pytest.mark.parametrize("objective", matrix(FALLS_BY_NATS, lambda name: name == "dpo", "rows of matrices"))
def test_plain_training_displaces_and_calibration_holds(
    objective: str, evaluations: dict[tuple[str, str], list[dict[str, Any]]]
) -> None:
    """Held-out mean change of the chosen log-probability at the end: clearly down without, not more than 0.1
    nats below the start with calibration, whose accuracy is at least as high; rejected falls in both."""
    off, on = evaluations[objective, "off"][-1], evaluations[objective, "on"][-1]
    assert off["step"] == on["step"] == 150
    assert off["displacement/chosen"] < -FALLS_BY_NATS[objective]
    assert on["displacement/chosen"] > -0.1
    assert on["displacement/accuracy"] >= off["displacement/accuracy"]
    assert max(off["displacement/rejected"], on["displacement/rejected"]) < -0.5


def test_all_runs_start_from_the_same_model(
    evaluations: dict[tuple[str, str], list[dict[str, Any]]],
) -> None:
    """Step 0 is the reference itself: no change, and the same log-probabilities in all four."""
    starts = [rows[0] for rows in evaluations.values()]
    assert all(row["displacement/chosen"] == row["displacement/rejected"] == 0 for row in starts)
    assert len({(row["logps/chosen"], row["logps/rejected"]) for row in starts}) == 1
