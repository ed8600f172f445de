"""Words that change a run when it is resumed: which keys there are, and which may change. Loads no torch, so
that a misspelt word is refused at once. Called by `rcpo.commands.resume` and `rcpo.launch.changes`."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rcpo.common.errors import UserError

SAFE = (
    "train.steps", "train.epochs", "train.save_every", "train.keep_last", "train.eval_every",
    "train.log_every", "train.on_save_error", "train.on_nonfinite", "train.max_nonfinite_steps",
    "train.stop_when", "train.keep_best", "train.evaluate", "evaluation.", "tracking.",
)  # fmt: skip
"""Keys (and, with a dot at the end, groups) that leave every step's bits as they are."""
SAFE_TO_ROUNDING = (
    "launch.", "deepspeed.stage", "train.pairs_per_device", "train.device", "train.deterministic",
    "model.gradient_checkpointing",
)  # fmt: skip
"""Keys that spread the same computation otherwise: equal but for the order of sums."""


def look_at_changes(config_file: Path, allowed: Sequence[str]) -> None:
    """Raise UserError for the first word that names no key of the config, or one that must stay. A file that
    is no config is said by who reads it next."""
    try:
        tree = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    if isinstance(tree, dict):
        for word in allowed:
            set_value(tree, word)


def set_value(top: dict[str, Any], word: str) -> str:
    """Set KEY=VALUE in the tree, where there is a value; returns the key. Raises UserError for one that is
    not there, or decides what is trained."""
    key, equals, value = word.partition("=")
    *groups, last = key.split(".")
    place: Any = top
    for group in groups:
        place = place.get(group) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place or isinstance(place[last], dict):
        close = difflib.get_close_matches(key, _keys(top), n=1)
        hint = f"did you mean {close[0]}?" if close else "type GROUP.KEY[=VALUE]"
        raise UserError(f"--allow-change {word}: {key} is no key of the run's config; {hint}")
    if not is_among(key, (*SAFE, *SAFE_TO_ROUNDING)):
        raise UserError(
            f"--allow-change {word}: {key} decides what is trained, so it cannot change; start a new run. "
            f"What can: {', '.join((*SAFE, *SAFE_TO_ROUNDING))}"
        )
    if equals:
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--allow-change {word}: {value} is no value; type {key}=VALUE") from None
    return key


def is_among(key: str, names: Sequence[str]) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in names)


def _keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
