"""The `rcpo` command: dispatch on the first word, everything heavy behind it.

Exit codes: 0 done, 1 a fault of rcpo's or the machine's (with a traceback), 2 bad input (one line), 130
interrupted.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from rcpo.commands import COMMANDS
from rcpo.common.errors import UserError

USAGE = """rcpo: preference optimisation with reward calibration

usage: rcpo COMMAND [words]

commands:
{commands}

Start here (no GPU, network or account; about a minute):
  rcpo train objective=simpo calibration=on

`rcpo COMMAND --help` explains a command."""


def usage() -> str:
    return USAGE.format(commands="\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items()))


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        sys.exit(dispatch(words))
    except UserError as error:
        print(f"rcpo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("rcpo: interrupted", file=sys.stderr)
        sys.exit(130)


def dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        import rcpo

        print(f"rcpo {rcpo.__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UserError(f"{words[0]}: no such command; choose one of {', '.join(COMMANDS)}")
    command = importlib.import_module(f"rcpo.commands.{words[0]}")
    code: int = command.run(words[1:])
    return code


if __name__ == "__main__":
    main()
