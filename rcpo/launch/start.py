"""From a resolved config to running ranks: in this process, in processes started here, or joined to what
torchrun or srun started.

Owns the order "check everything, make the run folder, start", and ending all ranks when one fails. Called by
`rcpo.commands.train` and `rcpo.commands.resume`.
"""

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rcpo.common.doing import doing
from rcpo.common.errors import UserError, error_of
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.inputs import Inputs
from rcpo.launch.at_end import check_tasks
from rcpo.launch.changes import changed_config
from rcpo.launch.overwrite import old_set_aside, refuse_irreplaceable, run_lock_held
from rcpo.launch.processes import run_ranks
from rcpo.launch.stage import with_stage
from rcpo.launch.worker import run_worker, train_raising
from rcpo.models.commits import at_commit
from rcpo.monitor.other_trackers import refuse_missing_tracker
from rcpo.ranks.distributed import initialize, rank, spoken_for, world_size
from rcpo.ranks.environment import joined_world_size
from rcpo.records.held_out_split import with_held_out_split
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree, open_run
from rcpo.training.identity import identity_of, refuse_other_inputs
from rcpo.training.read_inputs import read_inputs


class Prepared(NamedTuple):
    """A run that has been checked and is there to be trained."""

    run: RunFolder
    config: ResolvedConfig
    inputs: Inputs | None = None
    """What checking has read already; None: read them again."""


def start(prepare: Callable[[], ResolvedConfig | None], overwrite: bool = False) -> int:
    """Prepare a config, check its inputs, make its run folder and train; returns the exit code.

    `prepare` composes and resolves; it runs in one process only and returns None when there is nothing to
    run. With `overwrite` an old run folder makes way for the new one, once that has been checked.
    """
    if joined_world_size() is not None:
        return _joined(lambda: _make_run(prepare, overwrite), resume=False)
    made = _make_run(prepare, overwrite)
    if made is None:
        return 0
    with run_lock_held(made.run.path):
        return _run_here(made, resume=False)


def resume(path: str, allowed: Sequence[str] = ()) -> int:
    """Continue the run in `path`, with the config changes that `allowed` names (`rcpo.launch.changes`);
    returns the exit code."""
    if joined_world_size() is not None:
        return _joined(lambda: _reopen(path, allowed), resume=True)
    reopened = _reopen(path, allowed)
    _refuse_several_nodes(path, reopened)
    return _run_here(reopened, resume=True)


def _refuse_several_nodes(path: str, reopened: Prepared) -> None:
    nodes = reopened.config.launch.nodes
    if nodes > 1:
        raise UserError(
            f"{path}: was trained on {nodes} nodes; start `rcpo resume` on each with torchrun or srun, one "
            "task per GPU"
        )


def _make_run(prepare: Callable[[], ResolvedConfig | None], overwrite: bool = False) -> Prepared | None:
    """Everything that can be wrong with config and data is found before the folder exists."""
    config = prepare()
    if config is None:
        return None
    refuse_missing_tracker(config.tracking.name)
    check_tasks(config)
    run = RunFolder(config.run_dir)
    if overwrite:
        refuse_irreplaceable(config)
    else:
        run.refuse_existing()
    config, notes = with_split(config)
    doing(f"reading data {config.data.path if config.data.source == 'file' else config.data.source}")
    inputs = read_inputs(config)
    inputs.report.extend(notes)
    config = with_stage(at_commit(config), inputs)
    identity = identity_of(config, inputs)
    with old_set_aside(run.path):
        run.create(config, config_tree(config))
    run.update_run(inputs=identity, rows=inputs.account.as_json())
    return Prepared(run, config, inputs)


def with_split(config: ResolvedConfig) -> tuple[ResolvedConfig, list[str]]:
    """The config with the held-out split that its data set has, and notes about it."""
    data, notes = with_held_out_split(config.data)
    return dataclasses.replace(config, data=data), notes


def _reopen(path: str, allowed: Sequence[str]) -> Prepared:
    """A run to continue; whatever of its files is damaged is found before anything starts."""
    run, _ = open_run(path)
    changed = changed_config(run, allowed, joined_world_size())
    config = changed.config
    refuse_missing_tracker(config.tracking.name)
    check_tasks(config)
    for rows in (run.metrics, run.eval):
        run.rows(rows)
    if run.read_run().get("status") == "pending":
        config, _ = with_split(config)
    inputs = read_inputs(config)
    config = with_stage(at_commit(config), inputs)
    identity, known = identity_of(config, inputs), run.read_run().get("inputs")
    if isinstance(known, dict):
        refuse_other_inputs(path, known, identity)
    changed.write(run)
    if config != changed.config:  # a sweep's cell, which sees GPUs, hub and data for the first time
        run.freeze(config_tree(config))
    run.reopen()
    run.update_run(
        inputs=known or identity, rows=inputs.account.as_json()
    )  # a sweep's cell reads its data at its first start
    return Prepared(run, config, inputs)


def _run_here(prepared: Prepared, resume: bool) -> int:
    run, config, inputs = prepared
    num_ranks = config.world_size()
    doing(f"loading DeepSpeed for {num_ranks} rank{'' if num_ranks == 1 else 's'}")
    if num_ranks == 1:
        code = run_worker(run, config, resume, inputs)
    else:
        code, line = run_ranks(run, num_ranks, resume)
        if line:
            print(f"rcpo: {line}", file=sys.stderr)
    _discard_if_empty(run, code, resume)
    return code


def start_raising(prepare: Callable[[], ResolvedConfig], overwrite: bool = False) -> RunFolder:
    """`start` for a process that goes on afterwards (`rcpo.library`): what stops the run is raised."""
    made = _make_run(prepare, overwrite)
    assert made is not None
    with run_lock_held(made.run.path):
        _train_raising(made, resume=False)
    return made.run


def resume_raising(path: str, allowed: Sequence[str] = ()) -> None:
    """`resume` likewise, with the run's lock held."""
    with run_lock_held(Path(path)):
        reopened = _reopen(path, allowed)
        _refuse_several_nodes(path, reopened)
        _train_raising(reopened, resume=True)


def _train_raising(prepared: Prepared, resume: bool) -> None:
    run, config, inputs = prepared
    num_ranks = config.world_size()
    try:
        if num_ranks == 1:
            train_raising(run, config, resume, inputs)
        else:
            code, line = run_ranks(run, num_ranks, resume)
            if code:
                raise error_of(code, line)
    except UserError as error:
        _discard_if_empty(run, error.exit_code, resume)
        raise


def _discard_if_empty(run: RunFolder, code: int, resume: bool) -> None:
    """A run that bad input stopped before its first step leaves no half-made folder."""
    if code == 2 and not resume and not run.rows(run.metrics):
        shutil.rmtree(run.path, ignore_errors=True)


def _joined(open_or_make: Callable[[], Prepared | None], resume: bool) -> int:
    """One of the ranks that torchrun or srun started: rank 0 prepares, the others read the frozen config.

    Whatever rank 0 fails of, the others hear of it and end with it.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    initialize(device)
    prepared: Prepared | None = None
    with spoken_for() as tell:  # preparing may take an hour, on a first download
        if rank() == 0:
            try:
                prepared = open_or_make()
                tell({"run": None if prepared is None else str(prepared.run.path)})
            except BaseException as error:
                tell({"exit_code": error.exit_code if isinstance(error, UserError) else 1})
                raise
    answer = tell.heard
    if "exit_code" in answer:
        return int(answer["exit_code"])
    if answer["run"] is None:
        return 0
    run, config = open_run(answer["run"])
    fault = _misfit(config, device)
    if fault is not None:
        if rank() == 0:
            _discard_if_empty(run, 2, resume)
            raise UserError(fault)
        return 2
    is_new_here = rank() == 0 and not resume  # `rcpo resume` holds the lock already
    with run_lock_held(run.path) if is_new_here else contextlib.nullcontext():
        code = run_worker(run, config, resume, None if prepared is None else prepared.inputs)
        if rank() == 0:
            _discard_if_empty(run, code, resume)
    return code


def _misfit(config: ResolvedConfig, device: str) -> str | None:
    """What a run wants that the ranks that torchrun or srun started are not, in one line."""
    if config.train.device != device:
        return (
            f"train.device={config.train.device}: ranks that torchrun or srun started use {device} here; "
            "hide the GPUs with CUDA_VISIBLE_DEVICES='' to train on CPUs"
        )
    if config.world_size() != world_size():
        return (
            f"{config.run_dir}: is a run of {config.world_size()} ranks; start that many, not {world_size()}"
        )
    return None
