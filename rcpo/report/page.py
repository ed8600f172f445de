"""The HTML report: one file that needs no network. What it says is here, how it looks in report.html.j2."""

import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from plotly.offline import get_plotlyjs

import rcpo
from rcpo.common.console import KEPT_NATS, nats
from rcpo.common.page import TableCell, render
from rcpo.comparison.downstream import PREFIX
from rcpo.comparison.groups import Comparison, panels
from rcpo.comparison.keys import SPEED_ALONE, matches
from rcpo.comparison.summary import headline, sentences
from rcpo.comparison.table import GroupLine, notes
from rcpo.comparison.view import TOLD, Shown, View, make_view
from rcpo.report.answers import answers_of
from rcpo.report.destinations import destination_figure
from rcpo.report.fallen import ChesChoice, Fallen, FallenPair, find_fallen
from rcpo.report.figures import Figure, heat_map, objective_figures

ABOUT_FALLEN = (
    "Change of the chosen log-probability in nats, mean over seeds, by calibration; pair: its place in the "
    "held-out set; text as the data gives it now."
)
ABOUT_CHES = (
    " CHES (arXiv 2410.08847): of the pair under the model that the run started from; higher is meant to "
    "foretell a deeper fall of the chosen response."
)
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
"""Of the page: it asks nobody for anything."""


class Table(NamedTuple):
    heads: list[TableCell]
    rows: list[list[TableCell]]
    firsts: list[bool]
    """Whether a row is the first of its objective."""


def make_page(
    lines: Sequence[GroupLine], comparison: Comparison, ches: ChesChoice = "auto", view: View | None = None
) -> str:
    """The whole page; `ches`: whether the model is loaded to score the pairs that fell; `view`: the columns
    of its table."""
    view = view or make_view(lines, comparison)
    by_label = panels(comparison)
    heat = heat_map(comparison)
    figures: list[Figure] = [] if heat is None else [heat]
    fallen = find_fallen(by_label, ches)
    worst = min(
        by_label, key=lambda label: by_label[label][0].runs[0].evals["displacement/chosen"][-1], default=""
    )
    sections = []
    for label, groups in by_label.items():
        own = objective_figures(groups)
        if (went := destination_figure(groups)) is not None:
            own.append(went)
        section: dict[str, Any] = {"label": label, "figures": list(enumerate(own, len(figures)))}
        figures += own
        section |= {"fallen": fallen.get(label), "is_open": label == worst}
        if label in fallen:
            section |= {"about": ABOUT_FALLEN + _about_ches(fallen[label]), "table": _fallen(fallen[label])}
        sections.append(section | {"answers": answers_of(groups)})
    # In JSON inside of HTML the one dangerous character is "<", which ends a script.
    specs = json.dumps([figure.spec() for figure in figures], allow_nan=False).replace("<", "\\u003c")
    return render(
        "report/report.html.j2",
        policy=POLICY,
        title=_title(by_label),
        lead=headline(lines, comparison),
        sentences=[sentence.split(": ", 1) for sentence in sentences(lines, comparison)],
        comparison=comparison,
        num_runs=sum(len(group.runs) for group in comparison.groups),
        version=rcpo.__version__,
        time=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        heat=heat,
        tables=[
            (title, _main_table(own, columns))
            for kind, own in view.kinds.items()
            for title, columns in _tables_of(kind if len(view.kinds) > 1 else "", view)
        ],
        differing=[key for key in comparison.differing if not matches(key, SPEED_ALONE)],
        notes=notes(comparison, "±"),
        sections=sections,
        plotly=Markup(get_plotlyjs()),
        specs=Markup(specs),
        script=Markup((Path(__file__).parent / "report.js").read_text(encoding="utf-8")),
    )


def _title(labels: Iterable[str]) -> str:
    names = list(dict.fromkeys(label.split()[0] for label in labels))
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"rcpo: {shown or 'no finished runs'}"


def _tables_of(kind: str, view: View) -> list[tuple[str, list[Shown]]]:
    """Titles and columns: scores on tasks have a table of their own, since one is wider than a page."""
    scores = [column for column in view.columns if PREFIX in column.name]
    if view.is_selected or not scores:
        return [(kind, view.columns)]
    told = [column for column in view.columns if column.name in {each.name for each in TOLD}]
    rest = [column for column in view.columns if PREFIX not in column.name]
    title = f"{kind}: scores on tasks" if kind else "Scores on tasks"
    return [(kind, rest), (title, [*told, *scores])]


def _main_table(lines: Sequence[GroupLine], columns: Sequence[Shown]) -> Table:
    kinds = ["left words" if column.is_words else "" for column in columns]
    body = []
    for line in lines:
        mood = _mood(line.means["chosen"][0])
        body.append(
            [
                TableCell(column.text(line, "±"), mood if column.name == "chosen" else kind)
                for column, kind in zip(columns, kinds, strict=True)
            ]
        )
    labels = [line.group.row_label for line in lines]
    firsts = [label != before for label, before in zip(labels, [None, *labels], strict=False)]
    heads = [TableCell(column.head, kind) for column, kind in zip(columns, kinds, strict=True)]
    return Table(heads, body, firsts)


def _mood(change: float) -> str:
    if math.isnan(change) or abs(change) < KEPT_NATS:
        return ""
    return "down" if change < 0 else "up"


def _fallen(fallen: Fallen) -> Table:
    """The ten pairs whose chosen response fell most."""
    pairs = fallen.pairs
    titles = [TableCell(name) for name in ("pair", *pairs[0].changes)]
    rows = [
        [
            TableCell(str(pair.index)),
            *(TableCell(nats(change), _mood(change)) for change in pair.changes.values()),
        ]
        for pair in pairs
    ]
    for more, cells in (_ches_columns(fallen), _text_columns(pairs)):
        titles += more
        rows = [row + own for row, own in zip(rows, cells, strict=True)]
    return Table(titles, rows, [])


def _about_ches(fallen: Fallen) -> str:
    """Its sentences, where there is any."""
    if all(pair.ches is None for pair in fallen.pairs):
        return ""
    if fallen.correlation is None or math.isnan(fallen.correlation):
        return ABOUT_CHES
    return (
        f"{ABOUT_CHES} Percentile: of the held-out pairs, those with a lower CHES per token. Over all "
        f"{len(fallen.changes)} of them Spearman's correlation of CHES per token with the change under "
        f"{fallen.calibration} is {nats(fallen.correlation)}, where -1 would foretell every fall."
    )


def _ches_columns(fallen: Fallen) -> tuple[list[TableCell], list[list[TableCell]]]:
    """Heads, and each pair's cells; one cell that says why over all rows where there is no CHES."""
    pairs = fallen.pairs
    if fallen.no_ches is not None and fallen.no_text is None:
        why = TableCell(f"none: {fallen.no_ches}", "left reason", len(pairs))
        return [TableCell("CHES", "left")], [[why], *([] for _ in pairs[1:])]
    if any(pair.ches is None for pair in pairs):
        return [], [[] for _ in pairs]
    scores = [pair.ches for pair in pairs if pair.ches is not None]
    columns = {
        "CHES": same_decimals([score.ches for score in scores]),
        "CHES per token": same_decimals([score.per_token for score in scores]),
    }
    if fallen.correlation is not None:
        columns["percentile"] = [f"{pair.percentile:.0f}" for pair in pairs]
    rows = [[TableCell(text) for text in texts] for texts in zip(*columns.values(), strict=True)]
    return [TableCell(head) for head in columns], rows


def same_decimals(values: Sequence[float]) -> list[str]:
    """As many decimals as the largest needs for three significant digits."""
    largest = max(map(abs, values), default=0.0)
    decimals = min(9, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 0
    return [f"{value:.{decimals}f}" for value in values]


def _text_columns(pairs: Sequence[FallenPair]) -> tuple[list[TableCell], list[list[TableCell]]]:
    """Heads, and each pair's cells; none where the words are not there."""
    if any(pair.texts is None for pair in pairs):
        return [], [[] for _ in pairs]
    rows = [[TableCell(text, "text") for text in pair.texts or ()] for pair in pairs]
    return [TableCell(name, "left") for name in ("prompt", "chosen", "rejected")], rows
