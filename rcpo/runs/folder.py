"""The run folder on disk: names, small files, and what a resumed run finds. Written by rank 0 alone. What
needs torch imports it inside, so that looking at a run does not.

config.yaml  run.json  metrics.jsonl  eval.jsonl  reference.safetensors  eval/  logs/  checkpoints/  final/
best/  answers.jsonl  wandb/  tensorboard/  objective_module.py"""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import rcpo
from rcpo.common.code_version import code_hash, git_commit
from rcpo.common.errors import UserError
from rcpo.common.files import replacing, write_atomically
from rcpo.runs.own_module import keep_module, module_change
from rcpo.runs.rows import encode_row, read_rows

if TYPE_CHECKING:
    from rcpo.config.resolved import ResolvedConfig
    from rcpo.data.pairs import SideLogProbs

LIBRARIES = ("torch", "transformers", "deepspeed", "datasets", "hydra-core", "omegaconf", "wandb", "peft")


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.run_json = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.eval = self.path / "eval.jsonl"
        self.reference = self.path / "reference.safetensors"
        self.answers = self.path / "answers.jsonl"
        self.pair_results = self.path / "eval"
        self.logs = self.path / "logs"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.best = self.path / "best"
        self.plot = self.path / "displacement.png"

    def shown(self, path: Path) -> str:
        """A path in the run as it is typed where the run was started; elsewhere from the run's name on, since
        a model card is read on other machines."""
        path, here = path.absolute(), Path.cwd()
        return str(path.relative_to(here if path.is_relative_to(here) else self.path.absolute().parent))

    def refuse_existing(self) -> None:
        """Raise UserError when there is something at the path: a run never overwrites another."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(f"run_dir={self.path}: is no folder; choose another name=... or run_dir=...")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(
                f"run_dir={self.path}: exists and is not empty; choose another name=... or run_dir=..., "
                f"continue it with `rcpo resume {self.path}`, or replace it with --overwrite"
            )

    def create(self, config: "ResolvedConfig", tree: dict[str, Any], status: str = "running") -> None:
        """Make the folder with its frozen config and run.json; `status` pending: to be started later, by
        `reopen`. Raises UserError when it cannot be made."""
        self.refuse_existing()
        try:
            for folder in (self.path, self.logs, self.checkpoints, self.pair_results):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run_dir={self.path}: cannot be made ({error.strerror}); type run_dir=FOLDER"
            ) from None
        write_atomically(self.config, yaml.safe_dump(tree, sort_keys=False))
        self.update_run(
            name=config.name,
            config=tree,
            status=status,
            created=now(),
            git_commit=git_commit(),
            source_hash=code_hash(),
            world_size=config.world_size(),
            wandb_id=os.urandom(6).hex(),
            **(_start_facts() if status == "running" else {}),
            **keep_module(self.path, config.objective.get("module")),
        )

    def freeze(self, tree: dict[str, Any]) -> None:
        """Put the config in the place of the one that the folder was made with."""
        write_atomically(self.config, yaml.safe_dump(tree, sort_keys=False))
        self.update_run(config=tree)

    def reopen(self) -> None:
        """Say in run.json that the run goes on, or that a pending one starts, and warn where that happens
        under other code than before. Raises UserError when run.json is damaged."""
        known = self.read_run()
        is_start = known.get("status") == "pending"
        self.update_run(
            status="running",
            exit_reason=None,
            num_resumed=known.get("num_resumed", 0) + (not is_start),
            wandb_id=known.get("wandb_id") or os.urandom(6).hex(),
            **(_start_facts() if is_start else {"host": platform.node()}),
            **_code_change(known),
            **module_change(self.path, known),
        )

    def read_run(self) -> dict[str, Any]:
        """What run.json says; empty where there is none. UserError when it is damaged."""
        if not self.run_json.is_file():
            return {}
        try:
            run = json.loads(self.run_json.read_text(encoding="utf-8"))
        except ValueError:
            run = None
        if not isinstance(run, dict):
            raise UserError(f"{self.run_json}: is damaged; remove it to go on (the W&B id is lost with it)")
        return run

    def update_run(self, **changes: Any) -> None:
        """Merge `changes` into run.json."""
        write_atomically(self.run_json, json.dumps(self.read_run() | changes, indent=2) + "\n")

    def rows(self, path: Path) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl or eval.jsonl; see `read_rows`."""
        return read_rows(path)

    def rewind(self, step: int) -> None:
        """Drop rows after `step`, so that a resumed run writes each of them once."""
        for path in (self.metrics, self.eval):
            kept = [row for row in self.rows(path) if row["step"] <= step]
            write_atomically(path, "".join(encode_row(row) + "\n" for row in kept))

    def save_pair_results(self, step: int, result: "SideLogProbs") -> None:
        """Per-pair held-out log-probs of one evaluation, in the order of the held-out set."""
        from safetensors.torch import save_file

        path = self.pair_results / f"step-{step:06d}.safetensors"
        with replacing(path) as beside:
            save_file({"z_w": result.z_w.contiguous(), "z_l": result.z_l.contiguous()}, beside)

    def load_pair_results(self, step: int) -> "SideLogProbs":
        from safetensors.torch import load_file

        from rcpo.data.pairs import SideLogProbs

        tensors = load_file(self.pair_results / f"step-{step:06d}.safetensors")
        return SideLogProbs(tensors["z_w"], tensors["z_l"])


def now() -> str:
    """UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _start_facts() -> dict[str, Any]:
    """When, where and with what a run starts."""
    from importlib.metadata import version

    return {
        "started": now(),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES} | {"rcpo": rcpo.__version__},
    }


def _code_change(known: dict[str, Any]) -> dict[str, Any]:
    """What run.json gets, and a warning, when a run goes on under other code than it last had."""
    changes = known.get("code_changes", [])
    last = changes[-1] if changes else known
    if last.get("source_hash") in (None, code_hash()):
        return {}
    print(
        f"rcpo: warning: rcpo's code has changed since this run was made (hash {last['source_hash']}, "
        f"commit {last.get('git_commit')}; now {code_hash()}, commit {git_commit()})",
        file=sys.stderr,
        flush=True,
    )
    change = {"time": now(), "git_commit": git_commit(), "source_hash": code_hash()}
    return {"code_changes": [*changes, change]}
