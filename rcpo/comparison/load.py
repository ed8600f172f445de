"""One run folder as a `ComparedRun`: its config, status, curves and per-pair results, read without torch.

A run that cannot be read whole is a `ComparedRun` with a `problem`, never an error: one bad folder does not
hide the others.
"""

import json
import math
import platform
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rcpo.common.errors import UserError
from rcpo.common.locks import is_held, read_holder, run_lock
from rcpo.comparison.downstream import Downstream, read_downstream
from rcpo.comparison.metrics_cache import Columns, read_columns, read_metrics

BAND = ("position", "center", "lower", "upper", "inside")
CURVES = (
    "step",
    *(f"band/{name}" for name in BAND),
    "calibration/alpha",
    "score/cosine",
    "dynamics/pathway",
    "speed/pairs_per_second",
    "speed/peak_memory_gb",
)
"""Columns of metrics.jsonl that comparisons use."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Pairs:
    """Change of the held-out log-probs between the first and the last evaluation, pair by pair, (n,) each,
    fp64; `start` (2, n) is where both sides began. nan where a single answer has no such side."""

    r_w: np.ndarray
    r_l: np.ndarray
    start: np.ndarray

    def values(self, name: str) -> np.ndarray:
        """(n,) of chosen, rejected, margin, accuracy (a tie counts half) or fell; of single answers, of those
        that have what it is about."""
        has_w, has_l = ~np.isnan(self.start)
        if name == "rejected":
            return self.r_l[has_l]
        if name in ("margin", "accuracy"):
            r_w, r_l = self.r_w[has_w & has_l], self.r_l[has_w & has_l]
            return r_w - r_l if name == "margin" else (r_w > r_l) + 0.5 * (r_w == r_l)
        assert name in ("chosen", "fell")
        return self.r_w[has_w] if name == "chosen" else (self.r_w[has_w] < 0).astype(float)

    def has_chosen_alone(self) -> bool:
        """Whether all are chosen answers without another, of conversations, say."""
        return bool(np.isnan(self.start[1]).all())

    def are_finite(self) -> bool:
        return bool(np.isfinite(np.stack([self.r_w, self.r_l])[~np.isnan(self.start)]).all())


@dataclass(frozen=True)
class ComparedRun:
    """What comparisons use of a run; `rcpo.Run` is the run that users hold."""

    path: Path
    settings: dict[str, Any]
    """The frozen config, flat: optim.lr."""
    status: str
    problem: str | None
    """Why the run must not be averaged with others; None for one that is done and whole."""
    curves: Columns
    """`CURVES` over the optimizer steps, those that there are."""
    evals: Columns
    """eval.jsonl."""
    pairs: Pairs | None
    held_out: str | None = None
    """Digest of the held-out pairs (`rcpo.training.identity`); None where the run has none."""
    downstream: dict[str, Downstream] = field(default_factory=dict)
    """By task, where `rcpo evaluate` has been there."""

    @property
    def objective(self) -> str:
        return one_line(self.settings.get("objective.name", "?"))

    @property
    def calibration(self) -> str:
        return one_line(self.settings.get("calibration.name", "?"))

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")

    def last(self, key: str) -> float:
        """Of the last evaluation; nan where it has no such key."""
        found = self.evals.get(key)
        return math.nan if found is None else float(found[-1])

    @cached_property
    def measured(self) -> Columns:
        """The steps that measured the band."""
        inside = self.curves.get("band/inside")
        if inside is None:
            return {}
        selected = ~np.isnan(inside)
        return {name: values[selected] for name, values in self.curves.items()}


def load_run(path: Path) -> ComparedRun:
    """Everything of a run that comparisons use."""
    settings: dict[str, Any] = {}
    status, curves, evals, pairs, held_out = "unknown", Columns(), Columns(), None, None
    downstream: dict[str, Downstream] = {}
    try:
        settings = read_settings(path / "config.yaml")
        status, problem = read_status(path / "run.json")
        held_out = _read_held_out(path / "run.json")
        curves = read_metrics(path / "metrics.jsonl", CURVES)
        evals = _with_missing(read_columns(path / "eval.jsonl"))
        pairs = _read_pairs(path / "eval", evals)
        problem = problem or problem_of_evals(evals, pairs)
        downstream = read_downstream(path)
    except UserError as error:
        problem = str(error)
    return ComparedRun(path, settings, status, problem, curves, evals, pairs, held_out, downstream)


def _with_missing(evals: Columns) -> Columns:
    """With nan where nothing can be measured, of chosen answers without rejected ones."""
    if "displacement/chosen" not in evals:
        return evals
    nothing = np.full(len(evals["step"]), math.nan)
    return {f"displacement/{name}": nothing for name in ("rejected", "accuracy", "margin")} | evals


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted keys; an empty dict stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def read_settings(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError("config.yaml cannot be read")
    return flatten(tree)


def read_status(path: Path) -> tuple[str, str | None]:
    """(status, what is wrong with it) of run.json. A run that it says is running is lost where nothing on
    this machine, which last ran it, does."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        status = one_line(run["status"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError("run.json is missing or damaged") from None
    if status == "done":
        return status, None
    if status == "running" and _is_lost(run_lock(path.parent)):
        return "lost", "lost: nothing runs it any more"
    reason = run.get("exit_reason")
    return status, f"{status}: {one_line(reason)}" if reason else status


def _is_lost(lock: Path) -> bool:
    """Whether a process of this machine held the lock last, and none does now. Of other machines nothing can
    be told."""
    return read_holder(lock).get("host") == platform.node() and not is_held(lock)


def _read_held_out(path: Path) -> str | None:
    inputs = json.loads(path.read_text(encoding="utf-8")).get("inputs")
    digest = inputs.get("held_out_pairs") if isinstance(inputs, dict) else None
    return digest if isinstance(digest, str) else None


def one_line(value: object) -> str:
    """A value for tables, as it is typed: no line breaks, and nothing that moves a terminal's cursor."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def _read_pairs(folder: Path, evals: Columns) -> Pairs | None:
    """Per-pair results of the first and the last row of eval.jsonl; None without either."""
    if "step" not in evals:
        return None
    ends = []
    for step in evals["step"][[0, -1]].astype(int):
        file = folder / f"step-{step:06d}.safetensors"
        if not file.is_file():
            return None
        try:
            tensors = load_file(file)
            ends.append(np.stack([tensors["z_w"], tensors["z_l"]]).astype(np.float64))
        except (OSError, SafetensorError, KeyError, ValueError):
            raise UserError(f"eval/{file.name} is damaged") from None
    start, end = ends
    if start.shape != end.shape:
        raise UserError("eval/ holds different numbers of pairs")
    r_w, r_l = end - start
    return Pairs(r_w, r_l, start)


def problem_of_evals(evals: Columns, pairs: Pairs | None) -> str | None:
    if "displacement/chosen" not in evals:
        return "eval.jsonl holds no evaluation"
    if len(evals["step"]) < 2:
        return "was evaluated only once"
    sides = ["chosen"] if pairs is not None and pairs.has_chosen_alone() else ["chosen", "rejected"]
    last = [evals[f"displacement/{side}"][-1] for side in sides]
    if not np.isfinite(last).all() or (pairs is not None and not pairs.are_finite()):
        return "the last evaluation is not finite"
    return None
