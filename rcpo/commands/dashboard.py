"""`rcpo dashboard ENTITY/PROJECT`: a workspace and a report in W&B."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rcpo.commands.compare import load, say
from rcpo.commands.flags import Flags
from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.comparison.from_wandb import Address
    from rcpo.comparison.load import Run

HELP = """usage: rcpo dashboard ENTITY/PROJECT[/GROUP] [PATH...] [--update URL]... [--print]

Make two pages in W&B for the runs of a project, or of one of its groups: a workspace with the sections
displacement, band, calibration, incentives and speed, its runs grouped by objective and calibration, and a
report with the table of rcpo compare. PATH: take that table from run folders, as rcpo compare does; without,
from W&B. Pages that were made before stay as they are, unless:

  --update URL         remake what is at the URL (of a workspace or a report, as printed) in place of making
                       new pages: its contents are replaced, its name stays; at most one of each kind
  --print, --dry-run   print both as JSON and send nothing; needs no account

Needs wandb-workspaces: pip install 'rcpo[dashboard]'."""


def run(words: list[str]) -> int:
    """Make the pages; returns the exit code. Raises UserError for bad input and where W&B refuses."""
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0 if words else 2
    parser = Flags("dashboard")
    parser.add_argument("address", metavar="ENTITY/PROJECT")
    parser.add_argument("paths", nargs="*", metavar="PATH")
    parser.add_argument("--print", "--dry-run", dest="is_print", action="store_true")
    parser.add_argument("--update", action="append", default=[], metavar="URL")
    options = parser.parse_intermixed_args(words)
    if options.is_print and options.update:
        parser.error("argument --update: not allowed with argument --print")

    from rcpo.comparison.from_wandb import parse_address, require_key

    address = parse_address(options.address)
    require_library()
    from rcpo.comparison.dashboard import as_spec, is_report, make_report, make_workspace

    if options.is_print:
        table = table_of(load(options.paths)) if options.paths else None
        report = make_report(address, table, is_saved=False)
        spec = {"workspace": as_spec(make_workspace(address)), "report": as_spec(report)}
        say(json.dumps(spec, indent=2) + "\n")
        return 0
    urls = {("report" if is_report(url, address) else "workspace"): url for url in options.update}
    if len(urls) < len(options.update):
        parser.error("argument --update: one workspace and one report at most")
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

    from rcpo.comparison.dashboard import remade
    from rcpo.comparison.from_wandb import failed

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


def table_of(runs: "list[Run]") -> str:
    """The table of `rcpo compare`, its sentences and its notes, as Markdown."""
    from rcpo.comparison.cells import compare_runs
    from rcpo.comparison.forms import as_markdown
    from rcpo.comparison.table import make_rows

    comparison = compare_runs(runs)
    return as_markdown(make_rows(comparison), comparison)
