"""The HTML report: one file that needs no network. Everything that comes from runs or data is escaped."""

import html
import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from plotly.offline import get_plotlyjs

import rcpo
import rcpo.common
from rcpo.common.console import KEPT_NATS, nats
from rcpo.comparison.curves import panels
from rcpo.comparison.fallen import ChesChoice, Fallen, FallenPair, find_fallen
from rcpo.comparison.figures import Figure, heat_map, objective_figures
from rcpo.comparison.groups import Comparison, Group
from rcpo.comparison.summary import headline, sentences
from rcpo.comparison.table import COLUMNS, Row, heads, line_texts, notes

HERE = Path(__file__).parent
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


def make_page(rows: Sequence[Row], comparison: Comparison, ches: ChesChoice = "auto") -> str:
    """The whole page; `ches`: whether the model is loaded to score the pairs that fell."""
    figures: list[Figure] = []
    by_label = panels(comparison)
    heat = heat_map(comparison)
    overview = "" if heat is None else _place(heat, figures, "narrow")
    fallen = find_fallen(by_label, ches)
    worst = min(
        by_label, key=lambda label: by_label[label][0].runs[0].evals["displacement/chosen"][-1], default=""
    )
    sections = [
        _objective_section(idx, label, groups, figures, _fallen_table(fallen.get(label), label == worst))
        for idx, (label, groups) in enumerate(by_label.items())
    ]
    num_runs = sum(len(group.runs) for group in comparison.groups)
    links = "".join(
        f'<a href="#objective-{idx}">{html.escape(label)}</a>' for idx, label in enumerate(by_label)
    )
    body = f"""<h1>{html.escape(_title(by_label))}</h1>
<p class="lead">{html.escape(headline(rows, comparison))}</p>
{_list(sentences(rows, comparison))}
<p class="meta">{num_runs} runs in {len(comparison.groups)} groups, {len(comparison.left_out)} runs left out;
rcpo {rcpo.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>
<p class="note screen">Drag in a figure to look closer, double-click to go back, click a legend to hide a
line.</p>
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
<title>{html.escape(_title(by_label))}</title>
<style>{(Path(rcpo.common.__file__).parent / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
{body}
<script>{get_plotlyjs()}</script>
<script type="application/json" id="figures">{specs}</script>
<script>{(HERE / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _title(labels: Iterable[str]) -> str:
    names = list(dict.fromkeys(label.split()[0] for label in labels))
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
        texts = line_texts(row, COLUMNS, "±")
        kinds = ["left" if idx < num_left else "" for idx in range(len(texts))]
        kinds[where] = _mood(row.means["chosen"][0])
        cells = "".join(
            f'<td class="{kind}">{html.escape(text)}</td>' for kind, text in zip(kinds, texts, strict=True)
        )
        first = "first" if row.group.row_label != previous else ""
        previous = row.group.row_label
        body.append(f'<tr class="{first}">{cells}</tr>')
    head = "".join(
        f'<th class="{"left" if idx < num_left else ""}">{html.escape(title)}</th>'
        for idx, title in enumerate(titles)
    )
    lines = "<br>".join(html.escape(note) for note in notes(comparison, "±"))
    return (
        f'<h2>All groups</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(body)}</tbody></table></div><p class="note">{lines}</p>'
    )


def _mood(change: float) -> str:
    if math.isnan(change) or abs(change) < KEPT_NATS:
        return ""
    return "down" if change < 0 else "up"


def _objective_section(idx: int, label: str, groups: list[Group], figures: list[Figure], fallen: str) -> str:
    """The figures, those of one plot two in a row where there is room, and the pairs that fell."""
    places = "".join(
        _place(figure, figures, "whole" if figure.facets else "") for figure in objective_figures(groups)
    )
    return (
        f'<h2 id="objective-{idx}">{html.escape(label)}</h2>\n<div class="figures">{places}</div>\n{fallen}'
    )


def _fallen_table(fallen: Fallen | None, is_open: bool) -> str:
    """The ten pairs whose winner fell most, in a part that opens."""
    if fallen is None:
        return ""
    pairs = fallen.pairs
    heads = [f"<th>{html.escape(name)}</th>" for name in ("pair", *pairs[0].changes)]
    columns = [[f"<td>{pair.index}</td>{_changes(pair)}" for pair in pairs]]
    for titles, cells in (_ches_columns(fallen), _text_columns(pairs)):
        heads += titles
        columns.append(cells)
    rows = "".join(f"<tr>{''.join(parts)}</tr>" for parts in zip(*columns, strict=True))
    missing = ""
    if fallen.no_text is not None:
        missing = f'<p class="note">Without their text: {html.escape(fallen.no_text)}</p>'
    return (
        f'<details class="fallen"{" open" if is_open else ""}><summary>'
        f"The {len(pairs)} pairs whose winner fell most under "
        f"{html.escape(fallen.calibration)}</summary>"
        f'<p class="note">{html.escape(ABOUT_FALLEN)}{html.escape(_about_ches(fallen))}</p>'
        f"{missing}"
        f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _changes(pair: FallenPair) -> str:
    return "".join(f'<td class="{_mood(change)}">{nats(change)}</td>' for change in pair.changes.values())


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


def _ches_columns(fallen: Fallen) -> tuple[list[str], list[str]]:
    """Heads, and a row's cells for each pair; one cell that says why over all rows where there is no CHES."""
    pairs = fallen.pairs
    if fallen.no_ches is not None and fallen.no_text is None:
        why = f'<td class="left reason" rowspan="{len(pairs)}">none: {html.escape(fallen.no_ches)}</td>'
        return ['<th class="left">CHES</th>'], [why, *[""] * (len(pairs) - 1)]
    if any(pair.ches is None for pair in pairs):
        return [], [""] * len(pairs)
    scores = [pair.ches for pair in pairs if pair.ches is not None]
    columns = {
        "CHES": same_decimals([score.ches for score in scores]),
        "CHES per token": same_decimals([score.per_token for score in scores]),
    }
    if fallen.correlation is not None:
        columns["percentile"] = [f"{pair.percentile:.0f}" for pair in pairs]
    rows = ["".join(f"<td>{text}</td>" for text in texts) for texts in zip(*columns.values(), strict=True)]
    return [f"<th>{head}</th>" for head in columns], rows


def same_decimals(values: Sequence[float]) -> list[str]:
    """As many decimals as the largest needs for three significant digits."""
    largest = max(map(abs, values), default=0.0)
    decimals = min(9, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 0
    return [f"{value:.{decimals}f}" for value in values]


def _text_columns(pairs: Sequence[FallenPair]) -> tuple[list[str], list[str]]:
    """Heads, and a row's cells for each pair; none where the words are not there."""
    if any(pair.texts is None for pair in pairs):
        return [], [""] * len(pairs)
    rows = [
        "".join(f'<td class="text">{html.escape(text)}</td>' for text in pair.texts or ()) for pair in pairs
    ]
    return [f'<th class="left">{name}</th>' for name in ("prompt", "chosen", "rejected")], rows


def _breakable(key: str) -> str:
    """A dotted key that may go on in a new line behind a dot."""
    return html.escape(key).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _settings(comparison: Comparison) -> str:
    """What groups differ in, group by group, and what they share."""
    head = "".join(f'<th class="left">{_breakable(key)}</th>' for key in comparison.differing)
    body = "".join(
        f'<tr><td class="left">{html.escape(group.label)}</td>'
        + "".join(
            f'<td class="left">{html.escape(str(group.settings.get(key, "-")))}</td>'
            for key in comparison.differing
        )
        + f"<td>{html.escape(group.seeds)}</td></tr>"
        for group in comparison.groups
    )
    common = "".join(
        f'<tr><td class="left">{html.escape(key)}</td><td class="left">{html.escape(str(value))}</td></tr>'
        for key, value in comparison.common.items()
    )
    return (
        '<h2 id="settings">Settings</h2><p class="note">What the groups differ in; - is a setting that '
        'a group does not read.</p><div class="scroll"><table>'
        f'<thead><tr><th class="left">group</th>{head}<th>seeds</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div><details><summary>Settings that all groups share</summary>"
        f'<div class="scroll"><table><tbody>{common}</tbody></table></div></details>'
    )
