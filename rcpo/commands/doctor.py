"""`rcpo doctor [--json]`: what this machine has and lacks for training, and what to do about it."""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from rcpo.commands.flags import Flags

if TYPE_CHECKING:
    from rcpo.launch.doctor import Finding

PLAIN_WIDTH = 400
"""Columns of a table that goes to a file or a pipe."""
COLOURS = {"ok": "green", "note": "yellow", "missing": "bold red"}


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Look at this machine: Python, packages, GPUs, DeepSpeed, SLURM, W&B, disks, memory. A table says
what was found and what to do about it. Nothing is changed, and no network is asked.

Exit code 0: training works here. 1: something that every run needs is missing."""
    parser.add_argument("--json", action="store_true", help="the same for programs")


def run(options: argparse.Namespace) -> int:
    """Print the findings; returns the exit code."""
    from rcpo.launch.doctor import examine

    findings = examine()
    is_fit = all(finding.verdict != "missing" for finding in findings)
    if options.json:
        print(json.dumps({"ok": is_fit, "findings": [dataclasses.asdict(one) for one in findings]}, indent=2))
    else:
        _print_table(findings, is_fit)
    return 0 if is_fit else 1


def _print_table(findings: list["Finding"], is_fit: bool) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from rcpo.common.console import RunConsole

    console = RunConsole()
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN)
    for title in ("", "what", "found", "what to do"):
        table.add_column(title, overflow="fold", no_wrap=title in ("", "what"))
    for finding in findings:
        colour = COLOURS[finding.verdict]
        table.add_row(
            Text(finding.verdict, colour), finding.what, Text(finding.seen), Text(finding.advice, colour)
        )
    console.print(table)
    notes = sum(finding.verdict == "note" for finding in findings)
    missing = [finding.what for finding in findings if finding.verdict == "missing"]
    end = f"Training works here; {notes} notes." if is_fit else f"Mend first: {', '.join(missing)}."
    console.print(end, style="" if is_fit else "bold red", soft_wrap=True)
