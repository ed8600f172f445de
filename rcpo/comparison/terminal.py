"""The table of a comparison on a terminal: as many columns as fit, a table for each model and data."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rcpo.common.console import KEPT_NATS, date_below, fitted
from rcpo.comparison.forms import as_markdown
from rcpo.comparison.groups import Comparison
from rcpo.comparison.summary import headline, sentences
from rcpo.comparison.table import GroupLine, notes
from rcpo.comparison.view import Shown, View

LONGEST_WORDS = 30
"""Columns of a terminal that a run's name or a setting may take before it goes on in the next line."""


def print_table(console: Console, lines: Sequence[GroupLine], comparison: Comparison, view: View) -> None:
    """Print the table, what it says and its notes; as Markdown with all columns where the console is no
    terminal."""
    pm = "+-" if console.options.ascii_only else "±"
    if not console.is_interactive:
        console.print(Text(as_markdown(lines, comparison, view, pm)), soft_wrap=True, end="")
        return
    shown = list(lines)
    _, columns = fitted(
        console, view.columns, lambda kept: _table(shown, shown, kept, pm), lambda column: column.rank
    )
    for kind, own in view.kinds.items():
        if len(view.kinds) > 1:
            console.print(Text(f"\n{kind}", style="bold"))
        console.print(_table(own, shown, columns, pm))
    hidden = [column.head for column in view.columns if column not in columns]
    if hidden:
        said = f"Not shown, for want of width: {', '.join(hidden)}. --columns NAME,... selects."
        console.print(Text(said, style="dim"))
    console.print(Text(headline(lines, comparison), style="bold"))
    for sentence in sentences(lines, comparison):
        console.print(Padding(Text(sentence), (0, 0, 0, 2)))
    console.print()
    for note in notes(comparison, pm):
        console.print(Text(note, style="yellow" if note.startswith("left out") else "dim"))


def _table(
    lines: Sequence[GroupLine], everything: Sequence[GroupLine], columns: Sequence[Shown], pm: str
) -> Table:
    """A table of `lines`, with columns as wide as `everything` needs them."""
    table = Table(
        box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    for column in columns:
        texts = [column.head, *(_text(column, line, pm) for line in everything)]
        parts = [part for text in texts for part in (text.split() if column.is_words else [text])]
        width = max(map(len, parts))
        if column.is_words:
            table.add_column(column.head, overflow="fold", width=min(LONGEST_WORDS, width))
        else:
            table.add_column(column.head, justify="right", no_wrap=True, width=width)
    previous = None
    for line in lines:
        cells = [Text(_text(column, line, pm)) for column in columns]
        chosen = line.means["chosen"][0]
        for cell, column in zip(cells, columns, strict=True):
            if column.name == "chosen" and abs(chosen) >= KEPT_NATS:
                cell.stylize("red" if chosen < 0 else "green")
        objective = line.group.settings.get("objective.name")
        if previous not in (None, objective):
            table.add_section()
        previous = objective
        table.add_row(*cells)
    return table


def _text(column: Shown, line: GroupLine, pm: str) -> str:
    text = column.text(line, pm)
    return date_below(text) if column.is_words else text
