"""`rcpo compare PATH...`: runs side by side, as a table, an HTML report, and figures for a paper."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcpo.commands.flags import Flags, check_writable
from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.comparison.cells import Comparison
    from rcpo.comparison.load import Run

HELP = """usage: rcpo compare PATH... [options]
       rcpo compare --wandb ENTITY/PROJECT[/GROUP] [options]

One row for each cell (objective, calibration and whatever else differs), its seeds merged into mean and
standard error, with the difference to calibration=off. PATH: run folders, sweep folders, folders of runs, or
patterns in quotes. Runs that are unfinished, failed, or measured on other pairs are named and left out.

  --wandb ADDRESS      the runs that W&B has of a project, or of one of its groups, in place of folders
  --where KEY=VALUE    only runs with this setting: --where objective=dpo,simpo --where optim.lr=1e-6
  --sort COLUMN        chosen, rejected, margin, accuracy, fell, in_band, worst, pairs_per_second, memory_gb,
                       vs_off, objective, calibration; -COLUMN falls: --sort=-chosen
  --csv, --json, --markdown, --latex
                       print the table in that form
  --html FILE          write the report: one file that needs no network
  --ches auto|yes|no   whether the report loads the model that the runs started from, to give the pairs that
                       fell most their CHES (arXiv 2410.08847); auto: where its folder is on this machine, of
                       at most 1 GB, and that takes no more than about a minute; yes: whatever it takes
  --pdf DIR, --png DIR write its figures for a paper"""


def parse(words: list[str]) -> argparse.Namespace:
    parser = Flags("compare")
    parser.add_argument("paths", nargs="*", metavar="PATH")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT")
    parser.add_argument("--where", action="append", default=[])
    parser.add_argument("--sort")
    form = parser.add_mutually_exclusive_group()
    for name in ("csv", "json", "markdown", "latex"):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name)
    for name in ("html", "pdf", "png"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--ches", choices=("auto", "yes", "no"), default="auto")
    options = parser.parse_intermixed_args(words)
    if not options.paths and options.wandb is None:
        parser.error("the following arguments are required: PATH (or --wandb ENTITY/PROJECT)")
    if options.paths and options.wandb is not None:
        parser.error("argument --wandb: not allowed with PATH")
    if options.html is not None:
        check_writable("--html", options.html)
    for name in ("pdf", "png"):
        if (folder := getattr(options, name)) is not None:
            check_writable(f"--{name}", folder, is_folder=True)
    return options


def run(words: list[str]) -> int:
    """Compare; returns the exit code. Raises UserError for bad input."""
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0 if words else 2
    options = parse(words)
    from rcpo.common.console import RunConsole
    from rcpo.comparison.cells import compare_runs
    from rcpo.comparison.forms import as_csv, as_json, as_latex, as_markdown
    from rcpo.comparison.select import select
    from rcpo.comparison.table import make_rows
    from rcpo.comparison.terminal import print_table

    runs = select(load(options.paths, options.wandb), options.where)
    comparison = compare_runs(runs)
    rows = make_rows(comparison, options.sort)
    if options.form is None:
        print_table(RunConsole(), rows, comparison)
    else:
        forms = {"csv": as_csv, "json": as_json, "markdown": as_markdown, "latex": as_latex}
        say(forms[options.form](rows, comparison))
    if options.html is not None:
        from rcpo.comparison.page import make_page

        write(options.html, make_page(rows, comparison, options.ches))
    for suffix in ("pdf", "png"):
        folder = getattr(options, suffix)
        if folder is not None:
            draw(comparison, folder, suffix)
    return 0


def load(paths: Sequence[str], address: str | None = None) -> "list[Run]":
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
    from rcpo.comparison.static import write_figures

    try:
        written = write_figures(comparison, folder, suffix)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another folder") from None
    print(f"wrote {len(written)} figures and captions.txt to {folder}", file=sys.stderr)


def write(path: Path, text: str) -> None:
    """Beside, then renamed. Raises UserError where that cannot be."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another file") from None
    print(f"wrote {path}", file=sys.stderr)
