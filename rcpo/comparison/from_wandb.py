"""Runs as W&B has them: read through its public API into the same `ComparedRun`s as folders give.

`fetch_runs` alone talks to W&B; what it gives are plain containers, which `as_run` turns into a
`ComparedRun`. One that rcpo did not make, that has not ended well, or of which W&B lacks steps has a problem.
"""

import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rcpo.common.errors import UserError
from rcpo.comparison.load import CURVES, ComparedRun, Pairs, flatten, one_line, problem_of_evals
from rcpo.comparison.metrics_cache import Columns, columns_of
from rcpo.monitor.wandb_media import PAIRS, PAIRS_COLUMNS

TIMEOUT_SECONDS = 60
NO_NUMBER = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How W&B writes what JSON has no number for."""


class Address(NamedTuple):
    """ENTITY/PROJECT[/GROUP]: where runs are in W&B."""

    entity: str
    project: str
    group: str | None

    def __str__(self) -> str:
        return "/".join(part for part in self if part is not None)


@dataclass(frozen=True)
class Fetched:
    """A run as the API has it."""

    path: str
    """ENTITY/PROJECT/ID."""
    state: str
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    pairs: dict[str, Any] | None
    """The file of the table of held-out pairs, where there is one."""


def parse_address(word: str) -> Address:
    """Raises UserError for anything else than two or three names."""
    parts = word.split("/", 2)
    if len(parts) < 2 or not all(parts) or word.startswith(("http:", "https:")):
        raise UserError(f"{word}: is no address in W&B; type ENTITY/PROJECT or ENTITY/PROJECT/GROUP")
    return Address(parts[0], parts[1], parts[2] if len(parts) > 2 else None)


def load_wandb_runs(address: Address) -> list[ComparedRun]:
    """Every run at the address, oldest first. Raises UserError where W&B cannot be read or has none there."""
    runs = [as_run(fetched) for fetched in fetch_runs(address)]
    if not runs:
        where = f"{address.entity}/{address.project}"
        of_group = "" if address.group is None else f" of group {address.group}"
        raise UserError(f"{where}: has no runs{of_group} in W&B; look at the project's page for its groups")
    return runs


def require_key() -> None:
    """Raise UserError where W&B would ask for a key."""
    from rcpo.monitor.tracking import has_key

    if not has_key():
        raise UserError("no API key of W&B is configured; type `wandb login`, or set WANDB_API_KEY")


def failed(address: Address, error: Exception) -> UserError:
    """The line for an error of W&B's."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{address}: W&B did not answer as it should ({one_line(first)}); check name and access")


def fetch_runs(address: Address) -> Iterator[Fetched]:
    """Runs of the address one by one, through W&B's public API. Raises UserError where that fails."""
    require_key()
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    filters = {} if address.group is None else {"group": address.group}
    try:
        api = wandb.Api(timeout=TIMEOUT_SECONDS)
        for run in api.runs(f"{address.entity}/{address.project}", filters=filters, lazy=False):
            yield _fetch(run)
    except (wandb.Error, WandbApiFailedError, ValueError, OSError) as error:
        raise failed(address, error) from None


def _fetch(run: Any) -> Fetched:
    """Everything of an API run that comparisons use; of runs that rcpo did not make, only what they are."""
    path, config, summary = "/".join(run.path), run.config, run.summary_metrics
    if not _is_ours(config):
        return Fetched(path, run.state, config, summary, [], None)
    file = summary.get(PAIRS)
    pairs = None
    if isinstance(file, dict) and "path" in file:
        with (
            tempfile.TemporaryDirectory() as folder,
            run.file(file["path"]).download(root=folder, replace=True) as stream,
        ):
            pairs = json.load(stream)
    return Fetched(path, run.state, config, summary, list(run.scan_history()), pairs)


def _is_ours(config: dict[str, Any]) -> bool:
    return all(isinstance(config.get(key), dict) and "name" in config[key] for key in SECTIONS)


SECTIONS = ("objective", "calibration")
"""Sections whose name every config of rcpo's has."""


def as_run(fetched: Fetched) -> ComparedRun:
    """What comparisons use of a run that was fetched."""
    path, status = Path(fetched.path), "done" if fetched.state == "finished" else fetched.state
    if not _is_ours(fetched.config):
        return ComparedRun(path, {}, status, "was not made by rcpo", {}, {}, None)
    steps, evaluations = _rows(fetched.history)
    curves = columns_of(steps)
    curves = {name: values for name, values in curves.items() if name in CURVES}
    evals = columns_of(evaluations)
    problem = None if status == "done" else f"{status} in W&B"
    pairs = None
    try:
        pairs = _pairs(fetched.pairs)
        problem = problem or problem_of_evals(evals, pairs) or _lost_steps(fetched, evals)
    except UserError as error:
        problem = problem or str(error)
    return ComparedRun(path, flatten(fetched.config), status, problem, curves, evals, pairs)


def _rows(history: Iterable[dict[str, Any]]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """(optimizer steps, evaluations) with the names of metrics.jsonl and eval.jsonl: W&B has both in one row
    where they are of one step."""
    steps, evaluations = [], []
    for row in sorted(history, key=lambda row: row["_step"]):
        numbers = {key: number for key, value in row.items() if (number := _number(value)) is not None}
        own = {
            key: value for key, value in numbers.items()
            if not key.startswith(("_", "eval/", "pairs/", "summary/")) and key != "step"
        }  # fmt: skip
        held_out = {
            key.removeprefix("eval/"): value for key, value in numbers.items() if key.startswith("eval/")
        }
        if own:
            steps.append({"step": float(row["_step"])} | own)
        if held_out:
            evaluations.append({"step": float(row["_step"])} | held_out)
    return steps, evaluations


def _number(value: object) -> float | None:
    """A value of a row; None for what is none, or not there."""
    if isinstance(value, str):
        return NO_NUMBER.get(value)
    return float(value) if isinstance(value, int | float) else None


def _pairs(table: dict[str, Any] | None) -> Pairs | None:
    if table is None:
        return None
    try:
        places = [table["columns"].index(name) for name in PAIRS_COLUMNS[1:]]
        values = np.array([[float(row[place]) for place in places] for row in table["data"]])
        r_w, r_l, *start = values.reshape(-1, len(places)).T
    except (KeyError, ValueError, TypeError, IndexError):
        raise UserError("the table of held-out pairs in W&B is not rcpo's") from None
    return Pairs(r_w, r_l, np.stack(start))


def _lost_steps(fetched: Fetched, evals: Columns) -> str | None:
    """W&B may have stopped before the run did: `rcpo.monitor.tracking` goes on without it. The summary comes
    last."""
    end = fetched.summary.get("summary/end_step")
    if end is None:
        return "W&B has no summary of it"
    last = evals["step"][-1]
    return None if last == end else f"W&B has its evaluations to step {last:.0f} of {end} only"
