"""RUN/config.yaml: the frozen config, as plain containers and back."""

import dataclasses
from typing import TYPE_CHECKING, Any

import yaml

from rcpo.common.errors import UserError
from rcpo.runs.folder import RunFolder
from rcpo.runs.own_module import refuse_lost_module

if TYPE_CHECKING:
    from rcpo.config.resolved import ResolvedConfig


def config_tree(config: "ResolvedConfig") -> dict[str, Any]:
    """The config as plain containers, ready for YAML and for W&B."""
    return dataclasses.asdict(config)


def refuse_no_run(path: str) -> None:
    """Raise UserError where `path` is no run folder."""
    if not RunFolder(path).config.is_file():
        raise UserError(
            f"{path}: is not a run folder (it has no config.yaml); give the folder that `rcpo train` printed"
        )


def open_run(path: str) -> "tuple[RunFolder, ResolvedConfig]":
    """An existing run and its frozen config; UserError when `path` is none."""
    refuse_no_run(path)
    folder = RunFolder(path)
    try:
        tree = yaml.safe_load(folder.config.read_text())
    except yaml.YAMLError as error:
        raise UserError(
            f"{folder.config}: is not YAML ({' '.join(str(error).split())[:200]}); mend it"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{folder.config}: is not a config; give another run")
    from rcpo.config.resolved import resolved_of

    folder = RunFolder(folder.path.absolute())
    refuse_lost_module(folder.path, tree)
    return folder, resolved_of(tree)
