"""`rcpo status SWEEP`: what state every cell of a sweep is in."""

from rcpo.commands.flags import Flags
from rcpo.common.errors import UserError

HELP = """usage: rcpo status SWEEP [--json]

One line for each cell of the sweep in the folder SWEEP: its state (pending, running, preempted, interrupted,
failed, lost, done), step, loss, mean change of the held-out chosen log-probability in nats, time left, node,
and why it failed. Lost: it was running, and nothing runs it now.

  --json  the same for programs"""


def run(words: list[str]) -> int:
    """Print the table; returns the exit code. Raises UserError where there is no sweep."""
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0 if words else 2
    flags = Flags("status")
    flags.add_argument("sweep", metavar="SWEEP")
    flags.add_argument("--json", action="store_true")
    options = flags.parse_args(words)
    from rcpo.sweep.folder import SweepFolder, is_sweep

    if not is_sweep(options.sweep):
        raise UserError(f"{options.sweep}: is not a sweep folder; give the one that `rcpo sweep` printed")
    sweep = SweepFolder(options.sweep)
    from rcpo.common.console import RunConsole
    from rcpo.sweep.status import read_statuses
    from rcpo.sweep.table import counts_line, status_json, status_table

    statuses = read_statuses(sweep)
    if options.json:
        print(status_json(sweep, statuses))
        return 0
    console = RunConsole()
    console.print(status_table(console, statuses))
    console.print(counts_line(statuses), soft_wrap=True)
    return 0
