"""data.filter: leave training pairs out by their pair scores.

Scores come from a file, so that training needs no pass of its own and every rank leaves out the same pairs.
Held-out pairs stay as they are. Called by `rcpo.training.read_inputs`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.schema import FilterConfig
from rcpo.data.pairs import PackedPairs, TokenizedPair, pair_digest
from rcpo.data.score_file import ADVICE, TRAIN, PairScoreFile, read_pair_scores

KEY = "data.filter.scores"


class Limit(NamedTuple):
    key: str
    column: str
    value: float
    is_lowest: bool = False
    is_percentile: bool = False


def limits_of(config: FilterConfig) -> list[Limit]:
    """The limits that are set."""
    given = (
        ("ches_max_percentile", "ches", False, True),
        ("ches_norm_max_percentile", "ches_norm", False, True),
        ("margin_min", "margin", True, False),
        ("margin_max", "margin", False, False),
    )
    values = ((name, getattr(config, name), *rest) for name, *rest in given)
    return [Limit(name, column, value, *kind) for name, value, column, *kind in values if value is not None]


def filter_pairs(pairs: PackedPairs, config: ResolvedConfig) -> tuple[PackedPairs, list[str]]:
    """The pairs within all limits, in their order, and lines for the log with how many each limit leaves out.

    Percentiles are of the scores of `pairs`; a pair with a score equal to a limit stays. Raises UserError
    where a pair has no scores, or its tokens are not those that were scored.
    """
    limits = limits_of(config.data.filter)
    if config.data.filter.scores is None or not limits:
        return pairs, []
    pair_scores = read_pair_scores(config.data.filter.scores, KEY)
    places = _places(pairs, pair_scores, config.data.filter.scores)
    columns = pair_scores.of_split(TRAIN)
    kept = np.ones(len(pairs), dtype=bool)
    report = [f"data.filter: scores by model.path={pair_scores.made_with.get('model.path', 'unknown')}"]
    for limit in limits:
        values = np.array([columns[limit.column][place] for place in places], dtype=float)
        bound = float(np.percentile(values, limit.value)) if limit.is_percentile else limit.value
        within = values >= bound if limit.is_lowest else values <= bound
        kept &= within
        sign = "<" if limit.is_lowest else ">"
        report.append(
            f"data.filter.{limit.key}={limit.value:g}: leaves out {int((~within).sum())} of {len(pairs)} "
            f"training pairs, with {limit.column} {sign} {bound:.6g}"
        )
    if not kept.any():
        shown = " ".join(f"data.filter.{limit.key}={limit.value:g}" for limit in limits)
        raise UserError(f"{shown}: leaves none of {len(pairs)} training pairs; type wider limits")
    report.append(f"data.filter: {int(kept.sum())} of {len(pairs)} training pairs are kept")
    return pairs.take(np.flatnonzero(kept).tolist()), report


def _places(pairs: Sequence[TokenizedPair], pair_scores: PairScoreFile, path: str) -> list[int]:
    """Where each pair stands in the training part of the file."""
    columns = pair_scores.of_split(TRAIN)
    by_row = {row: place for place, row in enumerate(columns["row"])}
    places = []
    for pair in pairs:
        place = by_row.get(pair.row)
        if place is None:
            raise UserError(
                f"{KEY}={path}: has no scores of training row {pair.row}{_made(pair_scores)}; {ADVICE}"
            )
        if columns["digest"][place] != pair_digest(pair):
            raise UserError(
                f"{KEY}={path}: row {pair.row} has other tokens now than when it was scored"
                f"{_made(pair_scores)}; {ADVICE}"
            )
        places.append(place)
    return places


def _made(pair_scores: PairScoreFile) -> str:
    """What the file says of its origin, in brackets."""
    shown = ", ".join(f"{key}={value}" for key, value in pair_scores.made_with.items() if value is not None)
    return f" (scored with {shown})" if shown else ""
