"""What can be refused before torch is loaded: words, kinds and ranges of values, names, and files and folders
that are not there. What is found here, `rcpo.launch.start` would find too, seconds later."""

import dataclasses
from pathlib import Path
from typing import Any

from rcpo.config.conditions import check_conditions
from rcpo.config.evaluation import check_option, refuse_missing_harness
from rcpo.config.names import BUILTIN, absolute, absolute_run_dir, all_absolute, check_name
from rcpo.config.schema import Config
from rcpo.config.validate import section_of
from rcpo.models.hub import commit_of, is_hub_id
from rcpo.models.places import check_config_file, refuse_no_place
from rcpo.monitor.other_trackers import refuse_missing_tracker
from rcpo.ranks.environment import joined_world_size
from rcpo.records.hub import revisions_at_commits
from rcpo.records.places import (
    files_of,
    held_out_place,
    local_path,
    refuse_absent,
    refuse_no_data,
    training_place,
)
from rcpo.runs.folder import RunFolder


def look(tree: dict[str, Any], overwrite: bool) -> None:
    """Raises UserError for the first fault of a composed tree that a look at it can tell."""
    config = section_of(Config, tree)
    check_conditions(config)
    refuse_missing_tracker(config.tracking.name)
    check_option(config.train.evaluate, config.evaluation.name)
    if config.train.evaluate is not None:
        what = f"train.evaluate={config.train.evaluate}"
        refuse_missing_harness(config.evaluation.tasks, what, "train.evaluate=word_problems")
    if config.name is not None:
        check_name(config.name)
    given = config.run_dir or (None if config.name is None else f"runs/{config.name}")
    if given is not None and not overwrite:
        RunFolder(absolute_run_dir(given)).refuse_existing()
    _look_at_model(absolute(config.model.path) or config.model.path)
    if not overwrite:  # else what it would remove is said first
        _look_at_data(config)


def look_at_inputs(tree: dict[str, Any]) -> None:
    """The same of model and data alone, for commands that make no run of this tree."""
    look_at_model(tree)
    _look_at_data(section_of(Config, tree))


def look_at_model(tree: dict[str, Any]) -> None:
    """The same of the model alone, for commands that make the data themselves."""
    config = section_of(Config, tree)
    check_conditions(config)
    _look_at_model(absolute(config.model.path) or config.model.path)


def _look_at_model(path: str) -> None:
    refuse_no_place(path)
    if path not in BUILTIN and Path(path).is_dir() and not (Path(path) / "adapter_config.json").is_file():
        check_config_file(Path(path), path)


def _look_at_data(config: Config) -> None:
    data = config.data
    if data.source != "file" or data.mix is not None:  # a mixture's errors say which part they are of
        return
    data = dataclasses.replace(data, path=all_absolute(data.path), eval_path=all_absolute(data.eval_path))
    places = [None if data.path is None else training_place(data), held_out_place(data)]
    for place in filter(None, places):
        for one in files_of(place):
            refuse_absent(one)
            if (folder := local_path(one)).is_dir():
                refuse_no_data(folder, one)


def ask_hub(tree: dict[str, Any]) -> None:
    """Ask the hub which commits it has of the model and the data; the start of the run, in this process, does
    not ask again. Raises UserError where it cannot be reached and none is here. Ranks that torchrun or srun
    started do not ask here, but once for all of them."""
    if joined_world_size() is not None:
        return
    config = section_of(Config, tree)
    if is_hub_id(absolute(config.model.path) or config.model.path):
        commit_of(config.model.path, config.model.revision)
    revisions_at_commits(config.data)
