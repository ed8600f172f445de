"""`rcpo status SWEEP|RUN`: what state every cell of a sweep is in, or a run."""

import argparse
import json
from dataclasses import asdict

from rcpo.commands.flags import Flags, given_run


def add_arguments(parser: Flags) -> None:
    parser.description = """\
One line for each cell of a sweep, or for a run: its state (pending, running, preempted, interrupted, failed,
lost, done), step, loss, mean change of the held-out chosen log-probability in nats, time left,
node, and why it failed. Lost: it was running, and nothing runs it now. Below, what became of an
evaluation that `rcpo evaluate --slurm` submitted."""
    parser.epilog = """\
examples:
  rcpo status sweeps-out/demo
  rcpo status runs/dpo-on-1"""
    parser.add_argument("sweep", metavar="RUN|SWEEP", help="the folder that the command printed")
    parser.add_argument("--json", action="store_true", help="the same for programs")


def run(options: argparse.Namespace) -> int:
    """Print the table; returns the exit code. Raises UserError where there is neither sweep nor run."""
    from rcpo.sweep.folder import SweepFolder, is_sweep

    if not is_sweep(options.sweep):
        return _of_run(options.sweep, options.json)
    sweep = SweepFolder(options.sweep)
    from rich.text import Text

    from rcpo.common.console import RunConsole
    from rcpo.sweep.slurm.evaluation import evaluated_lines, read_evaluated
    from rcpo.sweep.status import read_statuses
    from rcpo.sweep.table import counts_line, reason_lines, status_json, status_table

    statuses = read_statuses(sweep)
    evaluated = read_evaluated(sweep)
    if options.json:
        print(status_json(sweep, statuses, [asdict(each) for each in evaluated]))
        return 0
    console = RunConsole()
    console.print(status_table(console, statuses))
    for line in reason_lines(console, statuses):
        console.print(Text(line, style="red"))
    console.print(counts_line(statuses), soft_wrap=True)
    for line in evaluated_lines(evaluated):
        console.print(line, soft_wrap=True, markup=False)
    return 0


def _of_run(path: str, as_json: bool) -> int:
    """The same of one run."""
    run = given_run(path)
    from rcpo.common.console import RunConsole
    from rcpo.sweep.folder import Cell
    from rcpo.sweep.states import status_of
    from rcpo.sweep.table import cell_json, reason_lines, status_table

    status = status_of(run, Cell(run.path.absolute().name, {}, [], ""))
    if as_json:
        print(json.dumps(cell_json(status, run), indent=2))
        return 0
    console = RunConsole()
    console.print(status_table(console, [status]))
    for line in reason_lines(console, [status]):
        console.print(line, soft_wrap=True)
    return 0
