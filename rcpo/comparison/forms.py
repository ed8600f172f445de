"""The table of a comparison in the forms that other programs and papers read: CSV, JSON, Markdown, LaTeX."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from rcpo.comparison.groups import Comparison
from rcpo.comparison.summary import headline, sentences
from rcpo.comparison.table import GroupLine, notes
from rcpo.comparison.view import DATA, Shown, View, make_view


def as_csv(lines: Sequence[GroupLine], comparison: Comparison, view: View) -> str:
    """One row a group, every number; with `--columns` those alone."""
    rows = _flat(lines, view)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _flat(lines: Sequence[GroupLine], view: View) -> list[dict[str, Any]]:
    if view.is_selected:
        return [{column.name: column.plain(line) for column in view.columns} for line in lines]
    more = [column for column in view.columns if column.is_joined]
    return [line.flat() | {column.name: column.plain(line) for column in more} for line in lines]


def as_json(lines: Sequence[GroupLine], comparison: Comparison, view: View) -> str:
    """Groups, the runs left out with their reasons, and the settings that all groups share."""
    left_out = [{"path": str(item.run.path), "reason": item.reason} for item in comparison.left_out]
    groups = [
        flat | {"runs": [str(run.path) for run in line.group.runs]}
        for flat, line in zip(_flat(lines, view), lines, strict=True)
    ]
    # Programs read the key cells, its name before groups were called so.
    tree = {"cells": groups, "left_out": left_out, "common_settings": comparison.common}
    return json.dumps(tree, indent=2, default=str) + "\n"


def as_markdown(
    lines: Sequence[GroupLine], comparison: Comparison, view: View | None = None, pm: str = "±"
) -> str:
    """An aligned table for each kind of data and model, what they say in words, and the notes; all columns
    where no view is given."""
    view = view or make_view(lines, comparison)
    tables = []
    for kind, own in view.kinds.items():
        if len(view.kinds) > 1:
            tables.append(f"**{kind}**")
        tables.append(_markdown_table(own, view.columns, pm))
    lists = [
        "\n".join(f"- {text}" for text in texts)
        for texts in (sentences(lines, comparison), notes(comparison, pm))
        if texts
    ]
    return "\n\n".join([*tables, headline(lines, comparison), *lists]) + "\n"


def _markdown_table(lines: Sequence[GroupLine], columns: Sequence[Shown], pm: str) -> str:
    titles = [column.head for column in columns]
    body = [[column.text(line, pm).replace("|", "\\|") for column in columns] for line in lines]
    widths = [max(map(len, texts)) for texts in zip(titles, *body, strict=True)]
    rule = [
        "-" * max(3, width) if column.is_words else f"{'-' * (max(3, width) - 1)}:"
        for column, width in zip(columns, widths, strict=True)
    ]
    return "\n".join(_markdown_line(texts, rule, columns) for texts in [titles, rule, *body])


def _markdown_line(texts: Sequence[str], rule: Sequence[str], columns: Sequence[Shown]) -> str:
    padded = [
        text.ljust(len(dashes)) if column.is_words else text.rjust(len(dashes))
        for column, text, dashes in zip(columns, texts, rule, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


LATEX = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "<": "$<$", ">": "$>$",
}  # fmt: skip


def as_latex(lines: Sequence[GroupLine], comparison: Comparison, view: View) -> str:
    """A booktabs tabular; the notes as comments."""

    def escaped(text: str) -> str:
        return "".join(LATEX.get(char, char) for char in text)

    columns = view.columns
    if len(view.kinds) > 1 and not view.is_selected:
        columns = [DATA, *columns]
    rows = [[column.text(line, "±") for column in columns] for own in view.kinds.values() for line in own]
    body = "\n".join(f"{' & '.join(map(escaped, row))} \\\\" for row in rows)
    comments = "\n".join(f"% {note}" for note in notes(comparison, "+-"))
    sides = "".join("l" if column.is_words else "r" for column in columns)
    return (
        f"{comments}\n% needs \\usepackage{{booktabs}}\n"
        f"\\begin{{tabular}}{{{sides}}}\n\\toprule\n"
        f"{' & '.join(escaped(column.head) for column in columns)} \\\\\n\\midrule\n{body}\n\\bottomrule\n"
        "\\end{tabular}\n"
    )
