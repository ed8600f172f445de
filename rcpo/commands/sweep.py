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


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Run every cell of the grid in a sweep file. Every cell is composed and checked before anything
starts, and frozen in the sweep folder: later edits of conf/ change nothing there. The same command
again runs what is missing or has failed, and refuses when the definition has changed. Exit code: 0
when all cells are done, 1 when one is not."""
    parser.epilog = """\
a sweep file (all keys: the text at the top of rcpo/sweep/definition.py):
  overrides: [train.steps=300, tracking=none]
  axes:
    objective: [dpo, simpo, {label: dpo_b05, overrides: [objective=dpo, objective.beta=0.5]}]
    calibration: [off, on]
  seeds: [0, 1, 2]
  exclude: [{objective: dpo_b05, calibration: on}]

examples:
  rcpo sweep sweeps/demo.yaml --dry-run
  rcpo sweep sweeps/demo.yaml --parallel 2
  rcpo sweep sweeps/demo.yaml model.path=MODEL --slurm example --print

`rcpo status DIR` says how far it is, `rcpo resume DIR` goes on after Ctrl-C or a failure,
`rcpo cancel DIR` stops it."""
    add = parser.add_argument
    add("file", metavar="FILE", help="the sweep file")
    add("words", nargs="*", metavar="KEY=VALUE", help="further overrides, of all cells")
    add("--out", metavar="DIR", help="the sweep folder; default: sweeps-out/NAME")
    add("--parallel", type=positive_int, metavar="N", help="N cells at a time here; default: 1")
    add(
        "--dry-run",
        action="store_true",
        help="print the grid and what it costs; nothing is written, nothing fetched from the hub",
    )
    add(
        "--pairs-per-second",
        type=positive_float,
        metavar="X",
        help="speed of a cell, for the costs; default: as measured on this sweep's finished cells",
    )
    add(
        "--slurm",
        metavar="PROFILE",
        help="submit to SLURM instead: the name of a file in conf/cluster/, or a path",
    )
    add("--max-parallel", type=positive_int, metavar="N", help="with --slurm: at most N cells at a time")
    add("--print", action="store_true", help="with --slurm: show the batch script and submit nothing")
    add(
        "--wandb-sweep",
        action="store_true",
        help="print the grid as a W&B sweep, for `wandb sweep` and `wandb agent`; nothing is run",
    )
    parser.check = check


def check(options: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    if options.slurm is not None and options.parallel is not None:
        raise UserError("--parallel: is for cells on this machine; type --max-parallel with --slurm")
    if options.slurm is None and (options.print or options.max_parallel is not None):
        raise UserError("--print and --max-parallel: are for SLURM; type --slurm PROFILE as well")


def run(options: argparse.Namespace) -> int:
    """Sweep; returns the exit code. Raises UserError for bad input, before anything is written."""
    from rcpo.sweep.definition import check_words, read_definition

    check_words(options.words)
    definition = read_definition(options.file, options.words)
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
