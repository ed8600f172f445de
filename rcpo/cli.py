"""The `rcpo` command: dispatch on the first word, everything heavy behind it.

Exit codes: 0 done, 1 a fault of rcpo's or the machine's (with a traceback), 2 bad input (one line), 130
interrupted.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from rcpo.commands import COMMANDS
from rcpo.commands.parser import command_parser, whole_parser
from rcpo.common.doing import done_doing
from rcpo.common.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what TAB offers
        from rcpo.commands.completion import answer_shell

        answer_shell()
    try:
        sys.exit(dispatch(words))
    except UserError as error:
        done_doing()
        print(f"rcpo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        done_doing()
        print("rcpo: interrupted", file=sys.stderr)
        sys.exit(130)


def dispatch(words: list[str]) -> int:
    """Run the command of these words; returns its exit code. Raises UserError for bad input."""
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    name, *rest = words or ["--help"]
    if name.startswith("-"):
        whole_parser().parse_args([name, *rest])
        return 0
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command; choose one of {', '.join(COMMANDS)}")
    parser = command_parser(name)
    try:
        options = parser.parse(rest)
    except UserError:
        if rest:
            raise
        parser.print_help()  # the bare name of a command that needs words asks what they are
        return 2
    options.typed = rest
    code: int = importlib.import_module(f"rcpo.commands.{name}").run(options)
    return code


if __name__ == "__main__":
    main()
