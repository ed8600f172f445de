"""`rcpo watch PATH...`: what runs are doing now, until they have all ended."""

import argparse
import time

from rcpo.commands.flags import Flags

SECONDS_BETWEEN_LOOKS = 2.0


def add_arguments(parser: Flags) -> None:
    parser.description = """\
One line a run, renewed every two seconds until all have ended or Ctrl-C: status, step, change of
the chosen log-probability in the last training batches and on the held-out pairs, alpha, and where
the step stands in its band: [ and ] are the edges."""
    parser.epilog = """\
examples:
  rcpo watch runs/dpo-on-1
  rcpo watch sweeps-out/demo 'runs/simpo-*' --once"""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="run folders, sweep folders, folders of runs, or patterns in quotes",
    )
    parser.add_argument(
        "--once", action="store_true", help="print it once; so does a console that is not a terminal"
    )


def run(options: argparse.Namespace) -> int:
    """Watch; returns the exit code. Raises UserError for what is no run."""
    from rich.live import Live

    from rcpo.common.console import RunConsole
    from rcpo.comparison.find import find_runs
    from rcpo.report.live import Board

    board, console = Board(find_runs(options.paths)), RunConsole()
    board.look()
    if options.once or not console.is_interactive:
        if not console.is_interactive:
            console.width = 200
        console.print(board)
        return 0
    try:
        with Live(board, console=console, auto_refresh=False) as live:
            while not board.all_ended():
                time.sleep(SECONDS_BETWEEN_LOOKS)
                board.look()
                live.refresh()
    except KeyboardInterrupt:  # the way to leave: the runs go on
        return 0
    return 0
