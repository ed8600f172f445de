"""`rcpo watch PATH...`: what runs are doing now, until they have all ended."""

import time

from rcpo.commands.flags import Flags

HELP = """usage: rcpo watch PATH... [--once]

One line a run, renewed every two seconds until all have ended or Ctrl-C: status, step, change of the chosen
log-probability in the last training batches and on the held-out pairs, alpha, and where the step stands in
its band: [ and ] are the edges. PATH: run folders, sweep folders, folders of runs, or patterns in quotes.

  --once               print it once; so does a console that is not a terminal"""

SECONDS_BETWEEN_LOOKS = 2.0


def run(words: list[str]) -> int:
    """Watch; returns the exit code. Raises UserError for what is no run."""
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0 if words else 2
    flags = Flags("watch")
    flags.add_argument("paths", nargs="+", metavar="PATH")
    flags.add_argument("--once", action="store_true")
    options = flags.parse_intermixed_args(words)
    from rich.live import Live

    from rcpo.common.console import RunConsole
    from rcpo.comparison.find import find_runs
    from rcpo.comparison.live import Board

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
