"""The page of `rcpo score`: one file that needs no network. Everything that comes from data is escaped."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rcpo.common
from rcpo.common.console import number
from rcpo.data.records import shortened_texts
from rcpo.data.score_file import HELD_OUT, TRAIN, ScoreFile
from rcpo.quality.summary import MEASURES, findings, quantile_heads, quantile_rows
from rcpo.training.read_inputs import PairsRead

STYLE = Path(rcpo.common.__file__).parent / "page.css"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Of the page: it asks nobody for anything, and runs nothing."""
NUM_PAIRS = 20
NUM_LISTED = 100
"""Rows of a finding that are listed."""
HISTOGRAMS = ("ches", "ches_norm", "margin", "edit_distance")
BINS, WIDTH, HEIGHT = 40, 400, 120
SHOWN = ("ches_norm", "ches", "margin", "edit_distance", "shared_prefix", "len_w", "len_l")
HEADS = {
    "ches_norm": "CHES per token", "margin": "margin", "edit_distance": "edits", "shared_prefix": "shared",
    "len_w": "|y_w|", "len_l": "|y_l|",
}  # fmt: skip
"""Short ones, where texts need the room."""


def make_page(scores: ScoreFile, read: PairsRead) -> str:
    """The whole page."""
    columns = scores.of_split(TRAIN)
    num_held_out = len(scores.of_split(HELD_OUT)["row"])
    made = ", ".join(f"{key}={value}" for key, value in scores.made_with.items() if value is not None)
    title = f"rcpo score: {len(columns['row'])} training pairs"
    figures = "".join(_histogram(name, columns[name]) for name in HISTOGRAMS)
    meanings = "".join(
        f"<li><b>{html.escape(head)}</b>: {html.escape(meaning)}</li>" for head, meaning in MEASURES.values()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p class="meta">Scored with {html.escape(made)}; {num_held_out} held-out pairs are in the file too.</p>
<ul>{"".join(f"<li>{html.escape(line)}</li>" for line in read.report)}</ul>
<h2>Scores</h2>
{_table(quantile_heads(), [[html.escape(text) for text in row] for row in quantile_rows(scores)])}
<ul>{meanings}</ul>
<div class="figures">{figures}</div>
<h2>Repeats, contradictions, identical sides</h2>
{_findings(scores, read)}
<h2>The pairs of highest CHES per token</h2>
<p class="note">By arXiv 2410.08847 those whose chosen response is likely to fall furthest; left out by
data.filter.scores=FILE data.filter.ches_norm_max_percentile=95. Margin in nats; edits: edit distance, shared:
common beginning, |y_w| and |y_l|: lengths of chosen and rejected, all in tokens.</p>
{_highest(columns, read)}
</body>
</html>
"""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int = 0) -> str:
    """`rows` are HTML already. The first column names the row, the last `num_texts` are long texts."""
    num_numbers = len(heads) - 1 - num_texts
    kinds = ["left", *[""] * num_numbers, *["left text"] * num_texts]
    head = "".join(
        f'<th class="{kind}">{html.escape(text)}</th>' for kind, text in zip(kinds, heads, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{text}</td>' for kind, text in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _histogram(name: str, values: Sequence[float]) -> str:
    """Bars of a column over its range, as a picture in the page, with both ends and 0 written below."""
    counts, edges = np.histogram(values, BINS)
    low, high = float(edges[0]), float(edges[-1])
    step = WIDTH / BINS
    bars = "".join(
        f'<rect x="{idx * step:.1f}" y="{HEIGHT - HEIGHT * count / counts.max():.1f}" '
        f'width="{step - 1:.1f}" height="{HEIGHT * count / counts.max():.1f}" fill="#005b8f"/>'
        for idx, count in enumerate(counts)
    )
    labels = [(0.0, "start", number(low)), (float(WIDTH), "end", number(high))]
    zero = WIDTH * -low / (high - low)
    if 0.2 * WIDTH < zero < 0.8 * WIDTH:
        labels.append((zero, "middle", "0"))
    texts = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT}" y2="{HEIGHT + 4}" stroke="#222222"/>'
        f'<text x="{x:.1f}" y="{HEIGHT + 16}" text-anchor="{anchor}" font-size="11">{text}</text>'
        for x, anchor, text in labels
    )
    title = html.escape(MEASURES[name][0])
    return (
        f'<figure><h3>{title}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT + 20}" role="img" aria-label="{title}">'
        f'{bars}<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}" stroke="#222222"/>{texts}</svg>'
        f"<figcaption>{len(values)} training pairs in {BINS} bars of equal width; the highest has "
        f"{int(counts.max())}</figcaption></figure>"
    )


def _findings(scores: ScoreFile, read: PairsRead) -> str:
    items = []
    for finding in findings(scores, read):
        listed = finding.listed(NUM_LISTED)
        rows = f"<details><summary>rows</summary>{html.escape(listed)}</details>" if listed else ""
        items.append(f"<li>{html.escape(finding.text)}{rows}</li>")
    return f"<ul>{''.join(items)}</ul>"


def _highest(columns: dict[str, list[Any]], read: PairsRead) -> str:
    """The pairs with their text, as the data gives it."""
    records = {record.row: record for record in read.records.train}
    heads = ["row", *(HEADS.get(name) or MEASURES[name][0] for name in SHOWN), "prompt", "chosen", "rejected"]
    rows = []
    for place in np.argsort(columns["ches_norm"])[::-1][:NUM_PAIRS]:
        row = columns["row"][place]
        rows.append(
            [
                str(row),
                *(number(columns[name][place]) for name in SHOWN),
                *map(html.escape, shortened_texts(records[row])),
            ]
        )
    return _table(heads, rows, num_texts=3)
