"""The page of `rcpo score`: one file that needs no network. What it says is here, how it looks in
scores.html.j2."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rcpo.common.console import number
from rcpo.common.page import TableCell, render
from rcpo.data.score_file import HELD_OUT, TRAIN, PairScoreFile
from rcpo.quality.summary import PAIR_SCORES, findings, quantile_heads, quantile_rows
from rcpo.records.record import shortened_texts
from rcpo.training.read_inputs import PairsRead

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


def make_page(pair_scores: PairScoreFile, read: PairsRead) -> str:
    """The whole page."""
    columns = pair_scores.of_split(TRAIN)
    return render(
        "quality/scores.html.j2",
        policy=POLICY,
        title=f"rcpo score: {len(columns['row'])} training pairs",
        made=", ".join(f"{key}={value}" for key, value in pair_scores.made_with.items() if value is not None),
        num_held_out=len(pair_scores.of_split(HELD_OUT)["row"]),
        report=read.report,
        quantiles=_table(quantile_heads(), quantile_rows(pair_scores)),
        pair_scores=list(PAIR_SCORES.values()),
        histograms=[_histogram(name, columns[name]) for name in HISTOGRAMS],
        findings=[(finding.text, finding.listed(NUM_LISTED)) for finding in findings(pair_scores, read)],
        highest=_highest(columns, read),
    )


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int = 0
) -> tuple[list[TableCell], list[list[TableCell]]]:
    """Heads and rows. The first column names the row, the last `num_texts` are long texts."""
    kinds = ["left", *[""] * (len(heads) - 1 - num_texts), *["left text"] * num_texts]
    lines = [[TableCell(*both) for both in zip(line, kinds, strict=True)] for line in (heads, *rows)]
    return lines[0], lines[1:]


def _histogram(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Bars of a column over its range, with both ends and 0 written below."""
    counts, edges = np.histogram(values, BINS)
    low, high = float(edges[0]), float(edges[-1])
    step = WIDTH / BINS
    heights = [HEIGHT * count / counts.max() for count in counts]
    labels = [(0.0, "start", number(low)), (float(WIDTH), "end", number(high))]
    zero = WIDTH * -low / (high - low)
    if 0.2 * WIDTH < zero < 0.8 * WIDTH:
        labels.append((zero, "middle", "0"))
    return {
        "title": PAIR_SCORES[name][0],
        "width": WIDTH,
        "height": HEIGHT,
        "bars": [
            {
                "x": f"{idx * step:.1f}",
                "y": f"{HEIGHT - height:.1f}",
                "width": f"{step - 1:.1f}",
                "height": f"{height:.1f}",
            }
            for idx, height in enumerate(heights)
        ],
        "labels": [{"x": f"{x:.1f}", "anchor": anchor, "text": text} for x, anchor, text in labels],
        "num_pairs": len(values),
        "most": int(counts.max()),
    }


def _highest(columns: dict[str, list[Any]], read: PairsRead) -> tuple[list[TableCell], list[list[TableCell]]]:
    """The pairs with their text, as the data gives it."""
    records = {record.row: record for record in read.records.train}
    titles = [HEADS.get(name) or PAIR_SCORES[name][0] for name in SHOWN]
    heads = ["row", *titles, "prompt", "chosen", "rejected"]
    rows = [
        [
            str(columns["row"][place]),
            *(number(columns[name][place]) for name in SHOWN),
            *shortened_texts(records[columns["row"][place]]),
        ]
        for place in np.argsort(columns["ches_norm"])[::-1][:NUM_PAIRS]
    ]
    return _table(heads, rows, num_texts=3)
