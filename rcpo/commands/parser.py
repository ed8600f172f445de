"""The one parser of `rcpo`: help, usage errors and TAB completion all come from it.

Imports the file of the command at hand alone. Called by `rcpo.cli` and `rcpo.commands.completion`.
"""

import importlib

import rcpo
from rcpo.commands import COMMANDS
from rcpo.commands.flags import Flags

START = """Start here (no GPU, network or account; about a minute):
  rcpo train objective=simpo calibration=on"""
OWN_HELP = ("train",)
"""Commands whose --help depends on their other words: they declare that flag themselves."""


def command_parser(name: str) -> Flags:
    """The parser of one command."""
    return _filled(Flags(prog=f"rcpo {name}", add_help=name not in OWN_HELP), name)


def whole_parser(name: str | None = None) -> Flags:
    """The parser of all commands. The one of `name` knows its words and flags, the others are names alone."""
    parser = Flags(prog="rcpo", description="Preference optimisation with reward calibration.", epilog=START)
    parser.add_argument("-V", "--version", action="version", version=f"rcpo {rcpo.__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", help="`rcpo COMMAND --help` explains one:"
    )
    for known, text in COMMANDS.items():
        subparser = commands.add_parser(known, help=text, add_help=known not in OWN_HELP)
        if known == name:
            _filled(subparser, known)
    return parser


def _filled(parser: Flags, name: str) -> Flags:
    importlib.import_module(f"rcpo.commands.{name}").add_arguments(parser)
    return parser
