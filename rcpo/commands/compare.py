"""`rcpo compare PATH...`: runs side by side, as a table, an HTML report, and figures for a paper."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcpo.commands.flags import Flags, check_writable
from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically

if TYPE_CHECKING:
    from rcpo.comparison.groups import Comparison
    from rcpo.comparison.load import ComparedRun

SEE_HELP = "`rcpo compare --help` lists words and flags"


def add_arguments(parser: Flags) -> None:
    parser.usage = """\
rcpo compare PATH... [options]
       rcpo compare --wandb ENTITY/PROJECT[/GROUP] [options]"""
    parser.description = """\
One line for each group of runs (objective, calibration and whatever else matters and differs): its seeds
merged into mean and standard error, with the difference to calibration=off; a table for each model and data.
Runs that are unfinished, failed, or measured on other pairs are named and left out."""
    parser.epilog = """\
examples:
  rcpo compare sweeps-out/demo --html report.html
  rcpo compare runs --columns run,optim.lr,chosen,accuracy,win_rate --with win_rates.csv
  rcpo compare 'runs/*' --where objective=dpo,simpo --where optim.lr=1e-6 --sort=-chosen
  rcpo compare --wandb my-team/my-project --csv"""
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="PATH",
        help="run folders, sweep folders, folders of runs, or patterns in quotes",
    )
    add(
        "--wandb",
        metavar="ENTITY/PROJECT",
        help="the runs that W&B has of a project, or of one of its groups, in place of folders",
    )
    add(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this setting, or one of several: KEY=VALUE,VALUE",
    )
    add(
        "--sort",
        metavar="COLUMN",
        help="chosen, rejected, margin, accuracy, fell, in_band, worst, pairs_per_second, memory_gb, vs_off, "
        "objective, calibration; -COLUMN falls: --sort=-chosen",
    )
    add(
        "--columns",
        metavar="NAME,...",
        help="only these, in this order: run, objective, calibration, settings, data, n, the columns of "
        "--sort, p, those of --with, and settings such as optim.lr",
    )
    add(
        "--with",
        dest="joined",
        type=Path,
        metavar="FILE",
        help="join a table of yours by the runs' names (its column run or name, else the first): .csv, "
        ".tsv, .json or .jsonl",
    )
    _add_outputs(parser)
    parser.check = check


def _add_outputs(parser: Flags) -> None:
    """What comes out: the table's form, the page, figures."""
    add = parser.add_argument
    form = parser.add_mutually_exclusive_group()
    for name, title in (("csv", "CSV"), ("json", "JSON"), ("markdown", "Markdown"), ("latex", "LaTeX")):
        form.add_argument(
            f"--{name}", dest="form", action="store_const", const=name, help=f"print the table as {title}"
        )
    add("--html", type=Path, metavar="FILE", help="write the report: one file that needs no network")
    add(
        "--ches",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether the report loads the model that the runs started from, to give the pairs that fell "
        "most their CHES (arXiv 2410.08847); auto: where its folder is on this machine, of at most 1 GB, "
        "and that takes no more than about a minute; yes: whatever it takes",
    )
    for name in ("pdf", "png"):
        add(
            f"--{name}",
            type=Path,
            metavar="DIR",
            help=f"write the figures for a paper there, as {name.upper()}",
        )


def check(options: argparse.Namespace) -> None:
    """Raise UserError for values that do not go together, and files that cannot be written."""
    if not options.paths and options.wandb is None:
        raise UserError(f"the following arguments are required: PATH (or --wandb ENTITY/PROJECT); {SEE_HELP}")
    if options.paths and options.wandb is not None:
        raise UserError(f"argument --wandb: not allowed with PATH; {SEE_HELP}")
    if options.html is not None:
        check_writable("--html", options.html)
    for name in ("pdf", "png"):
        if (folder := getattr(options, name)) is not None:
            check_writable(f"--{name}", folder, is_folder=True)


def run(options: argparse.Namespace) -> int:
    """Compare; returns the exit code. Raises UserError for bad input."""
    from rcpo.common.console import RunConsole
    from rcpo.comparison.forms import as_csv, as_json, as_latex, as_markdown
    from rcpo.comparison.groups import compare_runs
    from rcpo.comparison.select import select
    from rcpo.comparison.table import make_lines
    from rcpo.comparison.terminal import print_table
    from rcpo.comparison.view import TAKEN, make_view

    runs = select(load(options.paths, options.wandb), options.where)
    comparison = compare_runs(runs)
    lines = make_lines(comparison, options.sort)
    joined = None
    if options.joined is not None:
        from rcpo.comparison.joined import read_joined

        joined = read_joined(options.joined, runs, TAKEN)
    names = None if options.columns is None else list(filter(None, options.columns.split(",")))
    view = make_view(lines, comparison, names, joined)
    if options.form is None:
        print_table(RunConsole(), lines, comparison, view)
    else:
        forms = {"csv": as_csv, "json": as_json, "markdown": as_markdown, "latex": as_latex}
        say(forms[options.form](lines, comparison, view))
    if options.html is not None:
        from rcpo.report.page import make_page

        write(options.html, make_page(lines, comparison, options.ches, view))
    for suffix in ("pdf", "png"):
        folder = getattr(options, suffix)
        if folder is not None:
            draw(comparison, folder, suffix)
    return 0


def load(paths: Sequence[str], address: str | None = None) -> "list[ComparedRun]":
    """Runs of folders, or of an address in W&B. Raises UserError where there are none."""
    if address is not None:
        from rcpo.comparison.from_wandb import load_wandb_runs, parse_address

        return load_wandb_runs(parse_address(address))
    from rcpo.comparison.find import find_runs
    from rcpo.comparison.load import load_run

    return [load_run(path) for path in find_runs(paths)]


def say(text: str) -> None:
    """To stdout; a reader that goes away (`rcpo compare --csv | head`) is no error."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def draw(comparison: "Comparison", folder: Path, suffix: str) -> None:
    """Raises UserError where the figures cannot be written."""
    from rcpo.report.static import write_figures

    try:
        written = write_figures(comparison, folder, suffix)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another folder") from None
    print(f"wrote {len(written)} figures and captions.txt to {folder}", file=sys.stderr)


def write(path: Path, text: str) -> None:
    """Raises UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another file") from None
    print(f"wrote {path}", file=sys.stderr)
