"""What the parsers of all commands share: errors of one line, the layout of help, types of values, checks of
paths. Called by `rcpo.commands`."""

import argparse
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rcpo.common.errors import UserError
from rcpo.config.other_names import typed_for_flag

if TYPE_CHECKING:
    from rcpo.runs.folder import RunFolder

WIDTH = 100
"""Columns of help, where the terminal has as many."""


def _layout(prog: str) -> argparse.HelpFormatter:
    """Flags are filled to the width; descriptions and examples stay as they are written."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=width)


class Flags(argparse.ArgumentParser):
    """Words and --flags of a command, in any order. What is wrong is a UserError that names the help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_layout, allow_abbrev=False, **settings)
        self.check: Callable[[argparse.Namespace], None] | None = None
        """Raises UserError for values that do not go together."""
        self.for_unknown: Callable[[str], str | None] = lambda flag: None
        """What to type in place of a flag that there is not, where that is known."""

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The values of `words`. Raises UserError for what is wrong with them; --help prints and exits."""
        options = self.parse_intermixed_args(words)
        if self.check is not None:
            self.check(options)
        return options

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--?\w\S*)", message)
        if unknown and (typed := self.for_unknown(unknown[1])) is not None:
            raise UserError(f"{unknown[1]}: no such flag; type {typed}")
        raise UserError(f"{message}; `{self.prog} --help` lists words and flags")


def add_config_words(parser: Flags, where: str = "`rcpo train --help`") -> None:
    """Words of a config, which `where` lists, as `options.words`, and --config-dir, as Hydra reads it, in
    `options.hydra`."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help=f"GROUP=OPTION chooses a file of settings, KEY=VALUE sets one: {where}",
    )
    text = "add a folder of your own options: DIR/objective/mine.yaml is objective=mine"
    _pass_on(parser, "--config-dir", "-cd", metavar="DIR", help=text)
    for flag in ("--config", "--config-name", "-cn", "--config-path", "-cp"):
        parser.add_argument(flag, action=_ConfigFile, nargs="?", help=argparse.SUPPRESS)
    parser.for_unknown = typed_for_flag


class _ConfigFile(argparse.Action):
    """A flag of other tools for a file of settings: refused, with what to type."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> NoReturn:
        from rcpo.config.refused import config_file_line

        given = str(values or "NAME")
        raise UserError(f"{option_string} {given}: {config_file_line(given)}")


def add_printing_flags(parser: Flags) -> None:
    """Hydra's flags that print something and do nothing else, in `options.hydra` too."""
    text = "print the composed config as YAML and stop: --cfg job"
    _pass_on(parser, "--cfg", "-c", metavar="job|hydra|all", help=text)
    _pass_on(parser, "--package", "-p", metavar="GROUP", help="of --cfg job that group alone")
    _pass_on(parser, "--info", "-i", nargs="?", const="all", help=argparse.SUPPRESS)
    resolve = "of --cfg job what rcpo decides too: learning rate, steps, ZeRO stage and the rest"
    parser.add_argument(
        "--resolve", dest="hydra", action="append_const", const="--resolve", default=[], help=resolve
    )


def add_grid_flags(parser: argparse._ActionsContainer) -> None:
    """Where and how the cells of a grid run."""
    add = parser.add_argument
    add("--out", metavar="DIR", help="the sweep folder; default: sweeps-out/NAME")
    add("--parallel", type=positive_int, metavar="N", help="N cells at a time here; default: 1")
    add(
        "--dry-run",
        action="store_true",
        help="print the grid and what it costs; nothing is written, nothing fetched from the hub",
    )
    add(
        "--pairs-per-second",
        type=positive_float,
        metavar="X",
        help="speed of a cell, for the costs; default: as measured on this sweep's finished cells",
    )
    add(
        "--slurm",
        metavar="PROFILE",
        help="submit to SLURM instead: the name of a file in conf/cluster/, or a path",
    )
    add_array_flags(parser)


def add_array_flags(parser: "argparse._ActionsContainer") -> None:
    """Of a job array, beside --slurm."""
    parser.add_argument(
        "--max-parallel",
        type=positive_int,
        metavar="N",
        help="with --slurm: at most N cells at a time; default: the profile's max_parallel",
    )
    parser.add_argument(
        "--print", action="store_true", help="with --slurm: show the batch script; nothing is written"
    )


GRID_FLAGS = ("out", "parallel", "dry_run", "pairs_per_second", "slurm", "max_parallel", "print")
"""What `add_grid_flags` adds, as attributes of the options."""


def check_grid_flags(options: argparse.Namespace) -> None:
    """Raise UserError for those of them that do not go together."""
    if options.slurm is not None and options.parallel is not None:
        raise UserError("--parallel: is for cells on this machine; type --max-parallel with --slurm")
    if options.slurm is None and (options.print or options.max_parallel is not None):
        raise UserError("--print and --max-parallel: are for SLURM; type --slurm PROFILE as well")


def _pass_on(parser: Flags, flag: str, short: str, **settings: Any) -> None:
    """A flag with a value, to `options.hydra`; its short form works and is not listed."""
    for name, text in ((flag, settings.pop("help")), (short, argparse.SUPPRESS)):
        parser.add_argument(
            name,
            dest="hydra",
            action="extend",
            default=[],
            type=lambda value: [flag, value],
            help=text,
            **settings,
        )


def positive_int(text: str) -> int:
    """A whole number above 0."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value


def check_writable(flag: str, path: Path, *, is_folder: bool = False) -> None:
    """Raise UserError where no file, or no files of a folder, can be written at `path`, before the work."""
    if path.exists() and path.is_dir() != is_folder:
        kind, wanted = ("file", "folder") if is_folder else ("folder", "file")
        raise UserError(f"{flag} {path}: is a {kind}; give the name of a {wanted}")
    places = [path, *path.absolute().parents] if is_folder else path.absolute().parents
    above = next(place for place in places if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{flag} {path}: {above} is no folder that can be written to; give another name")


def given_run(path: str) -> "RunFolder":
    """The run folder at `path`. Raises UserError where there is none, nor a sweep."""
    from rcpo.runs.folder import RunFolder

    run = RunFolder(path)
    if not run.config.is_file() or not run.run_json.is_file():
        raise UserError(
            f"{path}: is not a sweep folder, and no run; give the one that `rcpo sweep` or `rcpo train` "
            "printed"
        )
    return run
