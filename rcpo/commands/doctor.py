"""`rcpo doctor [--json]`: what this machine has and lacks for training, and what to do about it."""

import dataclasses
import json
from typing import TYPE_CHECKING

from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.launch.doctor import Finding

HELP = """usage: rcpo doctor [--json]

Look at this machine: Python, packages, GPUs, DeepSpeed, SLURM, W&B, disks, memory. A table says what was
found and what to do about it; --json prints the same for programs. Nothing is changed, and no network is
asked.

Exit code 0: training works here. 1: something that every run needs is missing."""
PLAIN_WIDTH = 200
"""Columns of a table that goes to a file or a pipe."""
COLOURS = {"ok": "green", "note": "yellow", "missing": "bold red"}


def run(words: list[str]) -> int:
    """Print the findings; returns the exit code."""
    if words in (["-h"], ["--help"]):
        print(HELP)
        return 0
    if words not in ([], ["--json"]):
        raise UserError(f"{' '.join(words)}: doctor takes no words; type rcpo doctor or rcpo doctor --json")
    from rcpo.launch.doctor import examine

    findings = examine()
    is_fit = all(finding.verdict != "missing" for finding in findings)
    if words == ["--json"]:
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
