"""`rcpo status SWEEP`: what state every cell of a sweep is in."""

import argparse

from rcpo.commands.flags import Flags
from rcpo.common.errors import UserError


def add_arguments(parser: Flags) -> None:
    parser.description = """\
One line for each cell of a sweep: its state (pending, running, preempted, interrupted, failed,
lost, done), step, loss, mean change of the held-out chosen log-probability in nats, time left,
node, and why it failed. Lost: it was running, and nothing runs it now."""
    parser.epilog = """\
example:
  rcpo status sweeps-out/demo"""
    parser.add_argument("sweep", metavar="SWEEP", help="the folder that `rcpo sweep` printed")
    parser.add_argument("--json", action="store_true", help="the same for programs")


def run(options: argparse.Namespace) -> int:
    """Print the table; returns the exit code. Raises UserError where there is no sweep."""
    from rcpo.sweep.folder import SweepFolder, is_sweep

    if not is_sweep(options.sweep):
        raise UserError(f"{options.sweep}: is not a sweep folder; give the one that `rcpo sweep` printed")
    sweep = SweepFolder(options.sweep)
    from rich.text import Text

    from rcpo.common.console import RunConsole
    from rcpo.sweep.status import read_statuses
    from rcpo.sweep.table import counts_line, reason_lines, status_json, status_table

    statuses = read_statuses(sweep)
    if options.json:
        print(status_json(sweep, statuses))
        return 0
    console = RunConsole()
    console.print(status_table(console, statuses))
    for line in reason_lines(console, statuses):
        console.print(Text(line, style="red"))
    console.print(counts_line(statuses), soft_wrap=True)
    return 0
