"""What has changed between a run and its resumption, and the record of it.

A run is resumed with the config that it was started with; run.json has a copy. A difference in
RUN/config.yaml, or one asked for on the command line, must be named with `--allow-change`, and only keys that
leave the training what it was can be (`rcpo.launch.allowed`). Called by `rcpo.launch.start`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically
from rcpo.config.resolve import resolve
from rcpo.config.resolved import ResolvedConfig, resolved_of
from rcpo.launch.allowed import SAFE, SAFE_TO_ROUNDING, is_among, set_value
from rcpo.runs.folder import RunFolder, now
from rcpo.runs.frozen import config_tree
from rcpo.training.checkpoint import newest_checkpoint, refuse_unloadable, step_of


class Changed(NamedTuple):
    """The config that a run goes on with, and how it differs from the one it was started with."""

    config: ResolvedConfig
    changes: list[dict[str, Any]]
    """{key, from, to, time} each; empty where nothing differs."""

    def write(self, run: RunFolder) -> None:
        """To config.yaml and run.json, where something differs."""
        if not self.changes:
            return
        write_atomically(run.config, yaml.safe_dump(config_tree(self.config), sort_keys=False))
        run.update_run(
            config=config_tree(self.config),
            world_size=self.config.world_size(),
            changes=[*run.read_run().get("changes", []), *self.changes],
        )


def changed_config(run: RunFolder, allowed: Sequence[str], joined: int | None) -> Changed:
    """The config to resume `run` with. `allowed` are KEY, for a difference that stands in RUN/config.yaml, or
    KEY=VALUE, which sets it. Nothing is written.

    Raises UserError for a difference that is not allowed, and for one that cannot be.
    """
    started = run.read_run().get("config")
    tree = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    before = started if isinstance(started, dict) else yaml.safe_load(run.config.read_text(encoding="utf-8"))
    named = {set_value(tree, word) for word in allowed}
    config = resolved_of(tree)
    differences = _differences(before, tree)
    if not differences:
        return Changed(config, [])
    for key, old, new in differences:
        if not is_among(key, (*SAFE, *SAFE_TO_ROUNDING)):
            raise UserError(
                f"{key}: the run was started with {_shown(old)}, not {_shown(new)}, and it decides what is "
                f"trained; put it back in {run.config}, or start a new run"
            )
        if key not in named:
            raise UserError(
                f"{key}: the run was started with {_shown(old)}, and {run.config} says {_shown(new)}; put it "
                f"back, or type rcpo resume {run.path} --allow-change {key}"
            )
    if config.optim.schedule != "constant" and {"train.steps", "train.epochs"} & {
        key for key, *_ in differences
    }:
        raise UserError(
            f"train.steps: with optim.schedule={config.optim.schedule} it decides the learning rate of every "
            "step, so it cannot change; start a new run"
        )
    config = resolve(config, joined)
    _check_newest(run, config)
    changes = [{"key": key, "from": old, "to": new, "time": now()} for key, old, new in differences]
    return Changed(config, changes)


def _check_newest(run: RunFolder, config: ResolvedConfig) -> None:
    """Refuse a change with which the newest checkpoint could not go on."""
    newest = newest_checkpoint(run)
    if newest is None:
        return
    refuse_unloadable(newest, config.world_size(), config.zero_stage, config.optim.name)
    done = step_of(newest)
    if config.train.steps is not None and config.train.steps < done:
        raise UserError(
            f"train.steps={config.train.steps}: the newest checkpoint is of step {done} already; type "
            f"train.steps={done} or more, or export that checkpoint"
        )


def _differences(before: Any, after: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value after) wherever two trees differ; None for what one lacks."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [(prefix, before, after)]
    found = []
    for key in dict.fromkeys([*before, *after]):
        inner = f"{prefix}.{key}" if prefix else str(key)
        found += _differences(before.get(key), after.get(key), inner)
    return found


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
