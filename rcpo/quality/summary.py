"""What the scores say: the table of quantiles, the findings in words, and both on the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rcpo.common.console import number
from rcpo.data.score_file import TRAIN, PairScoreFile
from rcpo.training.read_inputs import PairsRead

PAIR_SCORES = {
    "ches": ("CHES", "<h_w, h_l> - |h_w|^2, of summed hidden states (arXiv 2410.08847)"),
    "ches_norm": ("CHES, per token", "the same of their means"),
    "margin": ("margin (nats)", "z_w - z_l under the model"),
    "edit_distance": ("edit distance (tokens)", "between the two responses"),
    "shared_prefix": ("shared beginning (tokens)", "of the two responses"),
    "length_difference": ("length difference (tokens)", "chosen less rejected"),
}
"""Columns that are summarised: title and meaning."""
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
NUM_LISTED = 10
"""Rows of a finding that are listed on the terminal."""
IDENTICAL = "the sides are identical"


@dataclass(frozen=True)
class Finding:
    """A fault of the data in words, with the rows that have it."""

    text: str
    rows: list[str]

    def listed(self, num: int) -> str:
        """The first `num` rows; empty where there are none."""
        more = f", and {len(self.rows) - num} more" if len(self.rows) > num else ""
        return ", ".join(self.rows[:num]) + more


def quantile_rows(pair_scores: PairScoreFile) -> list[list[str]]:
    """A row for each pair score of the training pairs: its title and its percentiles."""
    columns = pair_scores.of_split(TRAIN)
    return [
        [title, *(number(value) for value in np.percentile(columns[name], PERCENTILES))]
        for name, (title, _) in PAIR_SCORES.items()
    ]


def quantile_heads() -> list[str]:
    return ["training pairs", *(f"{percent} %" for percent in PERCENTILES)]


def findings(pair_scores: PairScoreFile, read: PairsRead) -> list[Finding]:
    """Repeated, contradictory and identical sides among the training rows."""
    columns = pair_scores.of_split(TRAIN)
    repeats = _linked(columns, "repeats")
    against = _linked(columns, "contradicts")
    identical = read.records.account.training.dropped.get(IDENTICAL, [])
    alike = sorted(row for rows in read.train.dropped.values() for row in rows)
    return [
        Finding(
            f"{_counted(repeats, 'pair repeats', 'pairs repeat')} an earlier pair",
            [f"{row} repeats {first}" for row, first in repeats],
        ),
        Finding(
            f"{_counted(against, 'pair is', 'pairs are')} contradicted by another pair (A > B and B > A)",
            [f"{row} against {other}" for row, other in against],
        ),
        Finding(
            f"{_counted(identical, 'row', 'rows')} left out because {IDENTICAL}",
            [str(row) for row in identical],
        ),
        Finding(
            f"{_counted(alike, 'row', 'rows')} left out because no pair is left of the tokens (identical "
            "once tokenised, say)",
            [str(row) for row in alike],
        ),
    ]


def _counted(items: Sequence[Any], one: str, more: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else more}"


def _linked(columns: dict[str, list[Any]], name: str) -> list[tuple[int, int]]:
    both = zip(columns["row"], columns[name], strict=True)
    return [(row, other) for row, other in both if other is not None]


def print_summary(console: Console, pair_scores: PairScoreFile, read: PairsRead) -> None:
    """The table and the findings; plain ASCII where the console is no terminal."""
    for line in read.report:
        console.print(Text(line), soft_wrap=True)
    console.print()
    _print_table(console, quantile_heads(), quantile_rows(pair_scores))
    console.print()
    for title, meaning in PAIR_SCORES.values():
        console.print(Text(f"{title}: {meaning}", style="dim"), soft_wrap=True)
    for finding in findings(pair_scores, read):
        listed = finding.listed(NUM_LISTED)
        console.print(Text(finding.text + (f": rows {listed}" if listed else "")), soft_wrap=True)


def _print_table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """On a terminal drawn by rich, elsewhere as Markdown, which does not depend on a width."""
    if console.is_interactive:
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
        for idx, head in enumerate(heads):
            table.add_column(head, justify="right" if idx else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    rule = [f"{'-' * widths[0]}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    for row in (heads, rule, *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        console.print(Text(f"| {' | '.join(cells)} |"), soft_wrap=True)
