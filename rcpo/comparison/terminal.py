"""The table of a comparison on a terminal: as many columns as fit."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rcpo.common.console import KEPT_NATS
from rcpo.comparison.forms import as_markdown
from rcpo.comparison.groups import Comparison
from rcpo.comparison.summary import headline, sentences
from rcpo.comparison.table import COLUMNS, Column, GroupLine, heads, line_texts, notes

WIDE = 10_000


def print_table(console: Console, lines: Sequence[GroupLine], comparison: Comparison) -> None:
    """Print the table, what it says and its notes; as Markdown with all columns where the console is no
    terminal."""
    pm = "+-" if console.options.ascii_only else "±"
    if not console.is_interactive:
        console.print(Text(as_markdown(lines, comparison, pm)), soft_wrap=True, end="")
        return
    columns = list(COLUMNS)
    table = _table(lines, comparison, columns, pm)
    wide = console.options.update(width=WIDE)
    while columns[1:] and console.measure(table, options=wide).maximum > console.width:
        columns.remove(max(columns, key=lambda column: column.rank))
        table = _table(lines, comparison, columns, pm)
    console.print(table)
    if len(columns) < len(COLUMNS):
        hidden = ", ".join(column.head for column in COLUMNS if column not in columns)
        console.print(Text(f"Not shown, for want of width: {hidden}.", style="dim"))
    console.print(Text(headline(lines, comparison), style="bold"))
    for sentence in sentences(lines, comparison):
        console.print(Text(f"  {sentence}"))
    console.print()
    for note in notes(comparison, pm):
        console.print(Text(note, style="yellow" if note.startswith("left out") else "dim"))


def _table(lines: Sequence[GroupLine], comparison: Comparison, columns: Sequence[Column], pm: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), pad_edge=False)
    titles = heads(comparison, columns)
    num_left, where = titles.index("n"), titles.index("chosen")
    for idx, title in enumerate(titles):
        table.add_column(title, justify="left" if idx < num_left else "right")
    previous = None
    for line in lines:
        texts = [Text(text) for text in line_texts(line, columns, pm)]
        chosen = line.means["chosen"][0]
        if abs(chosen) >= KEPT_NATS:
            texts[where].stylize("red" if chosen < 0 else "green")
        if previous not in (None, line.group.row_label):
            table.add_section()
        previous = line.group.row_label
        table.add_row(*texts)
    return table
