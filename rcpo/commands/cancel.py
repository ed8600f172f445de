"""`rcpo cancel SWEEP|RUN`: stop what runs a sweep's cells, or a run; they write a checkpoint first."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rcpo.commands.flags import Flags, given_run
from rcpo.common.errors import UserError

PATIENCE_SECONDS = 600.0
"""How long to wait for checkpoints."""


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Stop a run, after a checkpoint. Or a sweep: the cells that run write a checkpoint and end, the others
do not start. Under SLURM exactly this sweep's jobs are cancelled. `rcpo resume` goes on."""
    parser.epilog = """\
examples:
  rcpo cancel sweeps-out/demo
  rcpo cancel runs/dpo-on-1"""
    parser.add_argument("sweep", metavar="RUN|SWEEP", help="the folder that the command printed")


def run(options: argparse.Namespace) -> int:
    """Cancel; returns the exit code. Raises UserError where there is neither sweep nor run, or where
    it runs elsewhere."""
    from rcpo.common.locks import run_lock
    from rcpo.sweep.folder import SweepFolder, is_sweep

    if not is_sweep(options.sweep):
        return _end_holders([run_lock(given_run(options.sweep).path)], "nothing trains this run")
    sweep = SweepFolder(options.sweep)
    from rcpo.sweep.slurm.evaluation import record_of

    if sweep.slurm.is_file() or record_of(sweep).is_file():
        from rcpo.sweep.slurm.cancel import cancel

        code = cancel(sweep)
        if sweep.slurm.is_file():
            return code
    # The process that runs the sweep; then cells that outlived it, or were resumed one by one.
    locks = [sweep.lock, *(run_lock(sweep.run(cell).path) for cell in sweep.read_cells())]
    return _end_holders(locks, "nothing runs this sweep")


def _end_holders(locks: Sequence[Path], idle: str) -> int:
    """Stop the processes that hold these locks; `idle` is said where there are none."""
    from rcpo.common.locks import HeldError, end_holder, is_held

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
    print("stopped" if num_ended else idle)
    return 0
