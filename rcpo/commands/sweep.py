"""`rcpo sweep FILE`: a grid of runs, checked and frozen as a whole, then run here or by SLURM."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rcpo.commands.flags import Flags, add_grid_flags, check_grid_flags
from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.sweep.definition import Definition
    from rcpo.sweep.folder import SweepFolder
    from rcpo.sweep.target import Target


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Run every cell of the grid in a sweep file. Every cell is composed and checked before anything
starts, and frozen in the sweep folder: later edits of conf/ change nothing there. The same command
again runs what is missing or has failed. A file with more objectives, values or seeds runs the new
cells only; it is refused where a cell that is there would change. Exit code: 0 when all cells are
done, 1 when one is not."""
    parser.epilog = """\
a sweep file (all keys: the text at the top of rcpo/sweep/definition.py):
  overrides: [train.steps=300, tracking=none]
  axes:
    objective: [dpo, simpo, {label: dpo_b05, overrides: [objective=dpo, objective.beta=0.5]}]
    calibration: [off, on]
  seeds: [0, 1, 2]
  exclude: [{objective: dpo_b05, calibration: on}]

examples:
  rcpo sweep demo --dry-run                                    (one that ships with rcpo)
  rcpo sweep sweeps/demo.yaml --parallel 2
  rcpo sweep sweeps/demo.yaml model.path=MODEL --slurm example --print
  rcpo sweep search --search optuna --dry-run                  (a search: sweeps/search.yaml)

`rcpo status DIR` says how far it is, `rcpo resume DIR` goes on after Ctrl-C or a failure,
`rcpo cancel DIR` stops it."""
    add = parser.add_argument
    add("file", metavar="FILE", help="the sweep file, or the name of one that ships with rcpo")
    add("words", nargs="*", metavar="KEY=VALUE", help="further overrides, of all cells")
    add_grid_flags(parser)
    add(
        "--wandb-sweep",
        action="store_true",
        help="print the grid as a W&B sweep, for `wandb sweep` and `wandb agent`; nothing is run",
    )
    add(
        "--search",
        metavar="optuna",
        choices=["optuna"],
        help="search the file's axes for its search.metric with optuna; every trial is a cell",
    )
    parser.check = check


def check(options: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    check_grid_flags(options)
    if options.search is None:
        return
    others = {"--slurm": options.slurm, "--wandb-sweep": options.wandb_sweep,
              "--pairs-per-second": options.pairs_per_second}  # fmt: skip
    if given := next((flag for flag, value in others.items() if value), None):
        raise UserError(f"{given}: is for grids, and a search runs its trials here; leave it out")


def run(options: argparse.Namespace) -> int:
    """Sweep; returns the exit code. Raises UserError for bad input, before anything is written."""
    from rcpo.sweep.definition import check_words, read_definition

    check_words(options.words)
    definition = read_definition(options.file, options.words)
    if options.wandb_sweep:
        from rcpo.sweep.agents import wandb_sweep

        print(wandb_sweep(definition), end="")
        return 0
    if options.search is not None:
        return search(definition, options)
    return run_grid(definition, options)


def search(definition: "Definition", options: argparse.Namespace) -> int:
    """Search as the file says; returns the exit code."""
    from rcpo.sweep.folder import SweepFolder
    from rcpo.sweep.local import sweep_held
    from rcpo.sweep.search import look, run_search

    sweep = SweepFolder(options.out or f"sweeps-out/{definition.name}")
    with _offline() if options.dry_run else contextlib.nullcontext():
        lines = look(definition, sweep, fetch=not options.dry_run)
    if options.dry_run:
        print("\n".join(lines))
        return 0
    with sweep_held(sweep):
        return run_search(definition, sweep, options.parallel or 1)


def run_grid(definition: "Definition", options: argparse.Namespace) -> int:
    """Check, freeze and run the cells of a definition as the flags of `add_grid_flags` say; returns the exit
    code."""
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
    from rcpo.sweep.folder import SweepFolder
    from rcpo.sweep.grow import plan_growth, write_growth
    from rcpo.sweep.local import run_unfinished, sweep_held
    from rcpo.sweep.target import Here, Target

    sweep = SweepFolder(options.out or f"sweeps-out/{definition.name}")
    if sweep.study.is_file():
        raise UserError(f"{sweep.path}: is a search; type --search optuna, or --out FOLDER")
    target: Target = Here()
    if options.slurm is not None:
        from rcpo.sweep.slurm.profile import SlurmTarget, read_profile

        target = SlurmTarget(read_profile(options.slurm))
    if options.dry_run:
        _look_at_first(definition, target)
        return _print_plan(definition, sweep, target, options.pairs_per_second)
    if options.print:
        return _print_script(definition, sweep, options)
    if options.slurm is None and sweep.slurm.is_file():
        raise UserError(f"{sweep.path}: is a sweep of SLURM's; type --slurm PROFILE, or --out FOLDER")
    if not sweep.manifest.is_file():
        _look_at_first(definition, target)
    growth = plan_growth(definition, sweep, target)
    if growth.new:
        from rcpo.sweep.checks import check_inputs

        check_inputs(growth.new, fetch=True)
    with sweep_held(sweep):
        if growth.new or growth.seen == b"":
            write_growth(sweep, definition, growth)
        print(growth.line(sweep), flush=True)
        if options.slurm is not None:
            from rcpo.sweep.slurm import submit as slurm

            return slurm.submit(sweep, options.slurm, options.max_parallel, growth.names)
        return run_unfinished(sweep, options.parallel or 1, growth.names)


def _look_at_first(definition: "Definition", target: "Target") -> None:
    """Raise UserError for what a look at the first cell can tell, before torch is loaded: most faults are of
    all cells."""
    from rcpo.config.compose import compose
    from rcpo.launch.first_look import look_at_inputs
    from rcpo.sweep.expand import expand
    from rcpo.sweep.start import without_start

    point = expand(definition)[0]
    try:
        tree = compose(without_start([*point.words, *target.words]))
        assert tree is not None  # words are no flags: `rcpo.sweep.definition` has checked
        look_at_inputs(tree)
    except UserError as error:
        raise UserError(f"cell {point.name}: {error}") from None


def _print_plan(
    definition: "Definition", sweep: "SweepFolder", target: "Target", pairs_per_second: float | None
) -> int:
    """The grid and its costs; nothing is written."""
    from rcpo.common.console import RunConsole
    from rcpo.sweep.checks import check_inputs
    from rcpo.sweep.freeze import freeze_cells
    from rcpo.sweep.plan import print_plan

    cells = freeze_cells(definition, sweep, target)
    checked = check_inputs(cells, fetch=False)
    print_plan(RunConsole(), cells, checked, definition, sweep, pairs_per_second)
    return 0


def _print_script(definition: "Definition", sweep: "SweepFolder", options: argparse.Namespace) -> int:
    """The batch script; nothing is written. Cells are counted and not composed: a dry run does that."""
    from rcpo.sweep.expand import expand
    from rcpo.sweep.slurm.submit import script_of

    print(script_of(sweep, options.slurm, options.max_parallel, expand(definition)), end="")
    return 0
