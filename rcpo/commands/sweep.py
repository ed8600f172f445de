"""`rcpo sweep FILE`: a grid of runs, checked and frozen as a whole, then run here or by SLURM."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rcpo.commands.flags import Flags, positive_float, positive_int
from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.sweep.definition import Definition

HELP = """usage: rcpo sweep FILE [KEY=VALUE ...] [options]

Run every cell of the grid in the sweep file FILE, with further overrides of all cells. Every cell is composed
and checked before anything starts, and frozen in the sweep folder: later edits of conf/ change nothing there.
The same command again runs what is missing or has failed, and refuses when the definition has changed.

  --dry-run              print the grid and what it costs; nothing is written, nothing fetched from the hub
  --pairs-per-second X   speed of a cell, for the costs; default: as measured on this sweep's finished cells
  --out DIR              the sweep folder; default: sweeps-out/NAME
  --parallel N           run N cells at a time on this machine; default: 1
  --slurm PROFILE        submit to SLURM instead: a file in conf/cluster/, or a path
  --max-parallel N       with --slurm: at most N cells at a time
  --print                with --slurm: show the batch script and submit nothing
  --wandb-sweep          print the grid as a W&B sweep, for `wandb sweep` and `wandb agent`; nothing is run

A sweep file (all keys: the text at the top of rcpo/sweep/definition.py):

  overrides: [train.steps=300, tracking=none]
  axes:
    objective: [dpo, simpo, {label: dpo_b05, overrides: [objective=dpo, objective.beta=0.5]}]
    calibration: [off, on]
  seeds: [0, 1, 2]
  exclude: [{objective: dpo_b05, calibration: on}]

`rcpo status DIR` says how far it is, `rcpo resume DIR` goes on after Ctrl-C or a failure, `rcpo cancel DIR`
stops it. Exit code: 0 when all cells are done, 1 when one is not."""


def parse(words: list[str]) -> argparse.Namespace:
    flags = Flags("sweep")
    flags.add_argument("file", metavar="FILE")
    flags.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    flags.add_argument("--dry-run", action="store_true")
    flags.add_argument("--pairs-per-second", type=positive_float)
    flags.add_argument("--out")
    flags.add_argument("--parallel", type=positive_int)
    flags.add_argument("--slurm", metavar="PROFILE")
    flags.add_argument("--max-parallel", type=positive_int)
    flags.add_argument("--print", action="store_true")
    flags.add_argument("--wandb-sweep", action="store_true")
    options = flags.parse_intermixed_args(words)
    if options.slurm is not None and options.parallel is not None:
        raise UserError("--parallel: is for cells on this machine; type --max-parallel with --slurm")
    if options.slurm is None and (options.print or options.max_parallel is not None):
        raise UserError("--print and --max-parallel: are for SLURM; type --slurm PROFILE as well")
    return options


def run(words: list[str]) -> int:
    """Sweep; returns the exit code. Raises UserError for bad input, before anything is written."""
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0 if words else 2
    options = parse(words)
    from rcpo.sweep.definition import check_words, read_definition

    check_words(options.overrides)
    definition = read_definition(options.file, options.overrides)
    if options.wandb_sweep:
        from rcpo.sweep.agents import wandb_sweep

        print(wandb_sweep(definition), end="")
        return 0
    with _offline() if options.dry_run else contextlib.nullcontext():
        return _check_and_run(definition, options)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let the hub's clients, which are imported inside, read what is on this machine alone."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    saved = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_and_run(definition: "Definition", options: argparse.Namespace) -> int:
    from rcpo.common.console import RunConsole
    from rcpo.sweep.checks import check_inputs
    from rcpo.sweep.folder import SweepFolder
    from rcpo.sweep.freeze import Here, Target, freeze_cells, write_sweep
    from rcpo.sweep.local import run_unfinished, sweep_held
    from rcpo.sweep.plan import print_plan

    sweep = SweepFolder(options.out or f"sweeps-out/{definition.name}")
    target: Target = Here()
    if options.slurm is not None:
        from rcpo.sweep.slurm import submit as slurm
        from rcpo.sweep.slurm.profile import SlurmTarget, read_profile

        target = SlurmTarget(read_profile(options.slurm))
    cells = freeze_cells(definition, sweep, target)
    if options.dry_run:
        checked = check_inputs(cells, fetch=False)
        print_plan(RunConsole(), cells, checked, definition, sweep, options.pairs_per_second)
        return 0
    check_inputs(cells, fetch=True)
    if options.slurm is None and sweep.slurm.is_file():
        raise UserError(f"{sweep.path}: is a sweep of SLURM's; type --slurm PROFILE, or --out FOLDER")
    with sweep_held(sweep):
        write_sweep(sweep, definition, cells)
        print(f"{len(cells)} cells in {sweep.path}", flush=True)
        if options.slurm is not None:
            return slurm.submit(sweep, options.slurm, options.max_parallel, options.print)
        return run_unfinished(sweep, options.parallel or 1)
