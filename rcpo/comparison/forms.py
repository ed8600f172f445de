"""The table of a comparison in the forms that other programs and papers read: CSV, JSON, Markdown, LaTeX."""

import csv
import io
import json
from collections.abc import Sequence

from rcpo.comparison.groups import Comparison
from rcpo.comparison.summary import headline, sentences
from rcpo.comparison.table import COLUMNS, GroupLine, heads, line_texts, notes


def as_csv(lines: Sequence[GroupLine], comparison: Comparison) -> str:
    """One row a group, every number."""
    rows = [line.flat() for line in lines]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_json(lines: Sequence[GroupLine], comparison: Comparison) -> str:
    """Groups, the runs left out with their reasons, and the settings that all groups share."""
    left_out = [{"path": str(item.run.path), "reason": item.reason} for item in comparison.left_out]
    groups = [line.flat() | {"runs": [str(run.path) for run in line.group.runs]} for line in lines]
    # Programs read the key cells, its name before groups were called so.
    tree = {"cells": groups, "left_out": left_out, "common_settings": comparison.common}
    return json.dumps(tree, indent=2, default=str) + "\n"


def as_markdown(lines: Sequence[GroupLine], comparison: Comparison, pm: str = "±") -> str:
    """An aligned table, what it says in words, and the notes."""
    titles = heads(comparison, COLUMNS)
    body = [[text.replace("|", "\\|") for text in line_texts(line, COLUMNS, pm)] for line in lines]
    widths = [max(map(len, texts)) for texts in zip(titles, *body, strict=True)]
    num_left = titles.index("n")
    rule = ["-" * max(3, width) for width in widths]
    rule = [*rule[:num_left], *(f"{dashes[:-1]}:" for dashes in rule[num_left:])]
    table = "\n".join(_markdown_line(texts, rule, num_left) for texts in [titles, rule, *body])
    lists = [
        "\n".join(f"- {text}" for text in texts)
        for texts in (sentences(lines, comparison), notes(comparison, pm))
        if texts
    ]
    return "\n\n".join([table, headline(lines, comparison), *lists]) + "\n"


def _markdown_line(texts: Sequence[str], rule: Sequence[str], num_left: int) -> str:
    padded = [
        text.ljust(len(dashes)) if idx < num_left else text.rjust(len(dashes))
        for idx, (text, dashes) in enumerate(zip(texts, rule, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


LATEX = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "<": "$<$", ">": "$>$",
}  # fmt: skip


def as_latex(lines: Sequence[GroupLine], comparison: Comparison) -> str:
    """A booktabs tabular; the notes as comments."""

    def escaped(text: str) -> str:
        return "".join(LATEX.get(char, char) for char in text)

    titles = heads(comparison, COLUMNS)
    left = titles.index("n")
    body = "\n".join(f"{' & '.join(map(escaped, line_texts(line, COLUMNS, '±')))} \\\\" for line in lines)
    comments = "\n".join(f"% {note}" for note in notes(comparison, "+-"))
    return (
        f"{comments}\n% needs \\usepackage{{booktabs}}\n"
        f"\\begin{{tabular}}{{{'l' * left}{'r' * (len(titles) - left)}}}\n\\toprule\n"
        f"{' & '.join(map(escaped, titles))} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"
    )
