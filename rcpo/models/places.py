"""Whether `model.path` can be a model, as far as its name and config.json say. Loads no torch. Called by
`rcpo.models.load` and, before anything is loaded, by `rcpo.launch.first_look` and by commands that take a run
or a model."""

import json
import os
from pathlib import Path

from rcpo.common.errors import UserError
from rcpo.config.names import BUILTIN
from rcpo.models.hub import ADAPTER_CONFIG


def refuse_no_place(path: str) -> None:
    """Raise UserError where `path` is neither a folder, nor builtin:NAME, nor may be a hub id."""
    if path in BUILTIN or os.path.isdir(path):
        return
    if os.path.exists(path):
        raise UserError(f"model.path={path}: is a file; it must be a folder with config.json and weights")
    if path.startswith("cell:"):
        raise UserError(
            f"model.path={path[:200]}: is a cell of a sweep, which only a file of rcpo sweep can name; give "
            "its folder, SWEEP/cells/NAME/final"
        )
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path={path[:200]}: no such folder; give a model folder, a hub id or builtin:tiny"
        )


def refuse_no_run_or_model(word: str) -> None:
    """Raise UserError where `word` is neither a run folder nor a place of a model or an adapter."""
    if not (Path(word) / "config.yaml").is_file():
        refuse_no_place(word)


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def check_config_file(folder: Path, path: str) -> None:
    """Raise UserError where config.json is missing or no JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        final = folder / "final"
        advice = f"type model.path={final}" if final.is_dir() else "give another"
        raise UserError(f"model.path={path}: has no config.json, so it is no model folder; {advice}")
    try:
        is_object = isinstance(json.loads(file.read_bytes()), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise UserError(f"model.path={path}: its config.json is not a JSON object; copy the model again")
