"""The HTML report: one file that needs no network. Everything that comes from runs or data is escaped."""

import html
import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from plotly.offline import get_plotlyjs

import rcpo
from rcpo.compare.cells import Cell, Comparison
from rcpo.compare.curves import panels
from rcpo.compare.figures import Figure, heat_map, objective_figures
from rcpo.compare.pair_text import PairText, held_out_texts, most_fallen
from rcpo.compare.summary import headline, sentences
from rcpo.compare.table import COLUMNS, Row, cell_texts, heads, notes
from rcpo.console import KEPT_NATS, nats

HERE = Path(__file__).parent
MAX_TEXT = 600
"""Characters of one prompt or response in the table of fallen pairs."""
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
"""Of the page: it asks nobody for anything."""


def make_page(rows: Sequence[Row], comparison: Comparison) -> str:
    """The whole page."""
    figures: list[Figure] = []
    groups = panels(comparison)
    heat = heat_map(comparison)
    overview = "" if heat is None else _place(heat, figures, "narrow")
    texts = _texts(comparison)
    worst = min(
        groups, key=lambda label: groups[label][0].runs[0].evals["displacement/chosen"][-1], default=""
    )
    sections = [
        _objective_section(idx, label, cells, figures, _fallen(cells, texts[id(cells[0])], label == worst))
        for idx, (label, cells) in enumerate(groups.items())
    ]
    num_runs = sum(len(cell.runs) for cell in comparison.cells)
    links = "".join(
        f'<a href="#objective-{idx}">{html.escape(label)}</a>' for idx, label in enumerate(groups)
    )
    body = f"""<h1>{html.escape(_title(groups))}</h1>
<p class="lead">{html.escape(headline(rows, comparison))}</p>
{_list(sentences(rows, comparison))}
<p class="meta">{num_runs} runs in {len(comparison.cells)} cells, {len(comparison.left_out)} runs left out;
rcpo {rcpo.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>
<p class="note">Drag in a figure to look closer, double-click to go back, click a legend to hide a line.</p>
<nav>{links}<a href="#settings">settings</a></nav>
{overview}
{_main_table(rows, comparison)}
{"".join(sections)}
{_settings(comparison)}"""
    # In JSON inside of HTML the one dangerous character is "<", which ends a script.
    specs = json.dumps([figure.spec() for figure in figures], allow_nan=False).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(_title(groups))}</title>
<style>{(HERE / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
{body}
<script>{get_plotlyjs()}</script>
<script type="application/json" id="figures">{specs}</script>
<script>{(HERE / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _title(groups: Iterable[str]) -> str:
    names = list(dict.fromkeys(label.split()[0] for label in groups))
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"rcpo: {shown or 'no finished runs'}"


def _place(figure: Figure, figures: list[Figure], kind: str = "") -> str:
    """Where `report.js` draws the figure."""
    figures.append(figure)
    return (
        f'<figure class="{kind}"><h3>{html.escape(figure.title)}</h3>'
        f'<div id="figure-{len(figures) - 1}"></div>'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>\n"
    )


def _list(lines: Sequence[str]) -> str:
    """Lines of the form NAME: TEXT."""
    items = [
        f"<b>{html.escape(name)}</b>: {html.escape(text)}"
        for name, _, text in (line.partition(": ") for line in lines)
    ]
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>" if items else ""


def _main_table(rows: Sequence[Row], comparison: Comparison) -> str:
    titles = heads(comparison, COLUMNS)
    num_left, where = titles.index("n"), titles.index("chosen")
    body, previous = [], None
    for row in rows:
        texts = cell_texts(row, COLUMNS, "±")
        kinds = ["left" if idx < num_left else "" for idx in range(len(texts))]
        kinds[where] = _mood(row.means["chosen"][0])
        cells = "".join(
            f'<td class="{kind}">{html.escape(text)}</td>' for kind, text in zip(kinds, texts, strict=True)
        )
        first = "first" if row.cell.row_label != previous else ""
        previous = row.cell.row_label
        body.append(f'<tr class="{first}">{cells}</tr>')
    head = "".join(
        f'<th class="{"left" if idx < num_left else ""}">{html.escape(title)}</th>'
        for idx, title in enumerate(titles)
    )
    lines = "<br>".join(html.escape(note) for note in notes(comparison, "±"))
    return (
        f'<h2>All cells</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(body)}</tbody></table></div><p class="note">{lines}</p>'
    )


def _mood(change: float) -> str:
    if math.isnan(change) or abs(change) < KEPT_NATS:
        return ""
    return "down" if change < 0 else "up"


def _objective_section(idx: int, label: str, cells: list[Cell], figures: list[Figure], fallen: str) -> str:
    """The figures, those of one plot two in a row where there is room, and the pairs that fell."""
    places = "".join(
        _place(figure, figures, "whole" if figure.facets else "") for figure in objective_figures(cells)
    )
    return (
        f'<h2 id="objective-{idx}">{html.escape(label)}</h2>\n<div class="figures">{places}</div>\n{fallen}'
    )


def _texts(comparison: Comparison) -> dict[int, list[PairText] | str]:
    """Words of the held-out pairs, by id of a cell; read once for each data config."""
    known: dict[str, list[PairText] | str] = {}
    found = {}
    for cell in comparison.cells:
        if not cell.runs:
            continue
        key = repr([(name, value) for name, value in cell.settings.items() if name.startswith("data.")])
        if key not in known:
            known[key] = held_out_texts(cell.runs[0])
        found[id(cell)] = known[key]
    return found


def _fallen(cells: list[Cell], words: list[PairText] | str, is_open: bool) -> str:
    """The ten pairs whose winner fell most, in a part that opens."""
    pairs = most_fallen(cells, words)
    if not pairs:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in pairs[0].changes)
    with_text = pairs[0].text is not None
    if with_text:
        head += "".join(f'<th class="left">{name}</th>' for name in ("prompt", "chosen", "rejected"))
    body = []
    for pair in pairs:
        row = f"<td>{pair.index}</td>" + "".join(
            f'<td class="{_mood(change)}">{nats(change)}</td>' for change in pair.changes.values()
        )
        if pair.text is not None:
            parts = (pair.text.prompt, pair.text.chosen, pair.text.rejected)
            row += "".join(f'<td class="text">{html.escape(_shortened(part))}</td>' for part in parts)
        body.append(f"<tr>{row}</tr>")
    missing = (
        f'<p class="note">Without their text: {html.escape(words)}</p>' if isinstance(words, str) else ""
    )
    return (
        f"<details{' open' if is_open else ''}><summary>The {len(pairs)} pairs whose winner fell most under "
        f"{html.escape(cells[0].calibration)}</summary>"
        f'<p class="note">Change of the chosen log-probability in nats, mean over seeds, by calibration; '
        f"pair: its place in the held-out set; text as the data gives it now.</p>{missing}"
        f'<div class="scroll"><table><thead><tr><th>pair</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></details>"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT} characters more)"


def _settings(comparison: Comparison) -> str:
    """What cells differ in, cell by cell, and what they share."""
    head = "".join(f'<th class="left">{html.escape(key)}</th>' for key in comparison.differing)
    body = "".join(
        f'<tr><td class="left">{html.escape(cell.label)}</td>'
        + "".join(
            f'<td class="left">{html.escape(str(cell.settings.get(key, "-")))}</td>'
            for key in comparison.differing
        )
        + f"<td>{html.escape(cell.seeds)}</td></tr>"
        for cell in comparison.cells
    )
    common = "".join(
        f'<tr><td class="left">{html.escape(key)}</td><td class="left">{html.escape(str(value))}</td></tr>'
        for key, value in comparison.common.items()
    )
    return (
        '<h2 id="settings">Settings</h2><p class="note">What the cells differ in; - is a setting that a cell '
        'does not read.</p><div class="scroll"><table>'
        f'<thead><tr><th class="left">cell</th>{head}<th>seeds</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div><details><summary>Settings that all cells share</summary>"
        f'<div class="scroll"><table><tbody>{common}</tbody></table></div></details>'
    )
