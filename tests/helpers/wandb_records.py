"""What an offline W&B run holds, read by W&B's own reader, and what it should hold by the run's files."""

import json
import os
import subprocess
import sys
import time
from typing import Any

from rcpo.evaluation.results import Results
from rcpo.runs.folder import RunFolder


class Records:
    """What an offline W&B run holds, by W&B's own reader, `wandb leet inspect`."""

    def __init__(self, run: RunFolder) -> None:
        records = whole_records(run)
        self.history = [record["history"]["item"] for record in records if record["type"] == "history"]
        self.metrics = {
            record["metric"]["glob_name"]: record["metric"]["step_metric"]
            for record in records
            if record["type"] == "metric"
        }
        self.config: dict[str, Any] = {}
        for record in records:
            self.config |= record["config"].get("update", {}) if record["type"] == "config" else {}
        self.summary: dict[str, Any] = {}
        for record in records:
            self.summary |= record["summary"].get("update", {}) if record["type"] == "summary" else {}
        self.artifacts = {
            record["artifact"]["type"]: record["artifact"]
            for record in records
            if record["type"] == "artifact"
        }
        self.alerts = [record["alert"] for record in records if record["type"] == "alert"]
        (self.run,) = (record["run"] for record in records if record["type"] == "run")
        (self.exit_code,) = (record["exit"]["exit_code"] for record in records if record["type"] == "exit")


def whole_records(run: RunFolder, seconds: float = 30) -> list[dict[str, Any]]:
    """The file's records, once the last one is there: on a busy machine W&B's own process may still write
    when `finish` has returned."""
    (path,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    env = os.environ | {"WANDB_ERROR_REPORTING": "false"}
    deadline = time.monotonic() + seconds
    while True:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        if any(record["type"] == "exit" for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.5)


def by_step(run: RunFolder) -> dict[int, dict[str, Any]]:
    """The rows of metrics.jsonl and eval.jsonl, those of a step together, with the scores of evaluation.json
    in the last, as W&B should have them."""
    rows: dict[int, dict[str, Any]] = {}
    for row in run.rows(run.metrics):
        rows.setdefault(row["step"], {}).update(row)
    for row in run.rows(run.eval):
        named = {key if key == "step" else f"eval/{key}": value for key, value in row.items()}
        rows.setdefault(row["step"], {}).update(named)
    if rows:
        scores = {
            f"downstream/{task}": each.main[1].value for task, each in Results(run.path).of("final").items()
        }
        rows[max(rows)].update(scores)
    return rows


def wandb_rows(records: Records) -> dict[int, dict[str, Any]]:
    """The numbers of W&B's history without its own _step, _runtime and _timestamp and without tables; "NaN"
    and "Infinity" as floats."""
    others = ("_", "pairs/", "answers")
    return {
        row["_step"]: {key: float(value) for key, value in row.items() if not key.startswith(others)}
        for row in records.history
    }
