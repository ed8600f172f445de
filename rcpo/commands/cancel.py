"""`rcpo cancel SWEEP`: stop what runs the cells of a sweep; they write a checkpoint first."""

import argparse
import sys

from rcpo.commands.flags import Flags
from rcpo.common.errors import UserError

PATIENCE_SECONDS = 600.0
"""How long to wait for checkpoints."""


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Stop a sweep: the cells that run write a checkpoint and end, the others do not start. Under SLURM
exactly this sweep's jobs are cancelled. `rcpo resume SWEEP` goes on."""
    parser.epilog = """\
example:
  rcpo cancel sweeps-out/demo"""
    parser.add_argument("sweep", metavar="SWEEP", help="the folder that `rcpo sweep` printed")


def run(options: argparse.Namespace) -> int:
    """Cancel; returns the exit code. Raises UserError where there is no sweep, or where it runs elsewhere."""
    from rcpo.sweep.folder import SweepFolder, is_sweep

    if not is_sweep(options.sweep):
        raise UserError(f"{options.sweep}: is not a sweep folder; give the one that `rcpo sweep` printed")
    sweep = SweepFolder(options.sweep)
    if sweep.slurm.is_file():
        from rcpo.sweep.slurm import submit as slurm

        return slurm.cancel(sweep)
    from rcpo.common.locks import HeldError, end_holder, is_held, run_lock

    # The process that runs the sweep; then cells that outlived it, or were resumed one by one.
    locks = [sweep.lock, *(run_lock(sweep.run(cell).path) for cell in sweep.read_cells())]
    num_ended = 0
    for lock in locks:
        if not is_held(lock):
            continue
        try:
            ended = end_holder(lock, PATIENCE_SECONDS)
        except HeldError as error:
            raise UserError(f"{lock.parent}: is run by {error}; cancel it there") from None
        if not ended:
            print(f"rcpo: {lock.parent}: still runs after {PATIENCE_SECONDS:.0f} s", file=sys.stderr)
            return 1
        num_ended += 1
    print("stopped" if num_ended else "nothing runs this sweep")
    return 0
