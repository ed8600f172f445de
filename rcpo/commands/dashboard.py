"""`rcpo dashboard ENTITY/PROJECT`: a workspace and a report in W&B."""

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rcpo.commands.compare import load, say
from rcpo.commands.flags import Flags
from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.comparison.from_wandb import Address
    from rcpo.comparison.load import ComparedRun

SEE_HELP = "`rcpo dashboard --help` lists words and flags"


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Make two pages in W&B for the runs of a project, or of one of its groups: a workspace with the
sections displacement, band, calibration, incentives and speed, its runs grouped by objective and
calibration, and a report with the table of rcpo compare. Pages that were made before stay as they
are, unless --update names them.

Needs wandb-workspaces: pip install 'rcpo[dashboard]'."""
    parser.epilog = """\
examples:
  rcpo dashboard my-team/my-project
  rcpo dashboard my-team/my-project/demo sweeps-out/demo --print"""
    add = parser.add_argument
    add("address", metavar="ENTITY/PROJECT", help="the project; ENTITY/PROJECT/GROUP: one of its groups")
    add(
        "paths",
        nargs="*",
        metavar="PATH",
        help="take the table from run folders, as rcpo compare does; without, from W&B",
    )
    add(
        "--update",
        action="append",
        default=[],
        metavar="URL",
        help="remake what is at the URL (of a workspace or a report, as printed) in place of making new "
        "pages: its contents are replaced, its name stays; at most one of each kind",
    )
    add(
        "--print",
        "--dry-run",
        dest="is_print",
        action="store_true",
        help="print both as JSON and send nothing; needs no account",
    )
    parser.check = check


def check(options: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    if options.is_print and options.update:
        raise UserError(f"argument --update: not allowed with argument --print; {SEE_HELP}")


def run(options: argparse.Namespace) -> int:
    """Make the pages; returns the exit code. Raises UserError for bad input and where W&B refuses."""
    from rcpo.comparison.from_wandb import parse_address, require_key

    address = parse_address(options.address)
    require_library()
    from rcpo.report.dashboard import as_spec, is_report, make_report, make_workspace

    if options.is_print:
        table = table_of(load(options.paths)) if options.paths else None
        report = make_report(address, table, is_saved=False)
        spec = {"workspace": as_spec(make_workspace(address)), "report": as_spec(report)}
        say(json.dumps(spec, indent=2) + "\n")
        return 0
    urls = {("report" if is_report(url, address) else "workspace"): url for url in options.update}
    if len(urls) < len(options.update):
        raise UserError(f"argument --update: one workspace and one report at most; {SEE_HELP}")
    require_key()
    pages: dict[str, Callable[[], Any]] = {"workspace": lambda: make_workspace(address)}
    if not urls or "report" in urls:
        table = table_of(load(options.paths, None if options.paths else options.address))
        pages["report"] = lambda: make_report(address, table, is_saved=True)
    for kind, make in pages.items():
        if not urls or kind in urls:
            print(f"{kind}: {save(make, address, urls.get(kind))}", flush=True)
    return 0


def save(make: Callable[[], Any], address: "Address", url: str | None) -> str:
    """Send the page that `make` gives as a new one, or in place of what is at `url`; returns where it is.
    Raises UserError where W&B refuses."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    from rcpo.comparison.from_wandb import failed
    from rcpo.report.dashboard import remade

    try:
        page = make()
        if url is not None:
            page = remade(url, page)
        where: str = page.save().url
    except (wandb.Error, WandbApiFailedError, ValueError, OSError) as error:
        raise failed(address, error) from None
    # Where there is no such page, the library stumbles over the answer.
    except (TypeError, KeyError, IndexError, AttributeError):
        if url is None:
            raise
        raise UserError(
            f"--update {url}: W&B has no such page, or one that the library cannot read"
        ) from None
    return where


def require_library() -> None:
    """Raise UserError where wandb-workspaces is not installed."""
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        raise UserError("dashboard needs wandb-workspaces; type pip install 'rcpo[dashboard]'") from None


def table_of(runs: "list[ComparedRun]") -> str:
    """The table of `rcpo compare`, its sentences and its notes, as Markdown."""
    from rcpo.comparison.forms import as_markdown
    from rcpo.comparison.groups import compare_runs
    from rcpo.comparison.table import make_lines

    comparison = compare_runs(runs)
    return as_markdown(make_lines(comparison), comparison)
