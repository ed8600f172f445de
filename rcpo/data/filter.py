"""data.filter: leave training pairs out by their pair scores.

Scores come from a file, so that training needs no pass of its own and every rank leaves out the same pairs.
Held-out pairs stay as they are. Called by `rcpo.training.read_inputs`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.schema import FilterConfig
from rcpo.data.pairs import PackedPairs, TokenizedPair, pair_digest
from rcpo.data.score_file import ADVICE, TRAIN, PairScoreFile, read_pair_scores

KEY = "data.filter.scores"
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


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
        ("ches_min_percentile", "ches", True, True),
        ("ches_norm_max_percentile", "ches_norm", False, True),
        ("ches_norm_min_percentile", "ches_norm", True, True),
        ("margin_min", "margin", True, False),
        ("margin_max", "margin", False, False),
    )
    values = ((name, getattr(config, name), *rest) for name, *rest in given)
    return [Limit(name, column, value, *kind) for name, value, column, *kind in values if value is not None]


def window_of(config: FilterConfig) -> Limit | None:
    """The percentile whose `nearest` pairs are wanted, where one is set."""
    if config.ches_near_percentile is not None:
        return Limit("ches_near_percentile", "ches", config.ches_near_percentile, is_percentile=True)
    if config.ches_norm_near_percentile is not None:
        return Limit(
            "ches_norm_near_percentile", "ches_norm", config.ches_norm_near_percentile, is_percentile=True
        )
    return None


def filter_pairs(pairs: PackedPairs, config: ResolvedConfig) -> tuple[PackedPairs, list[str]]:
    """The pairs within all limits, in their order, and lines for the log with how many each limit leaves out.

    Percentiles are of the scores of `pairs`; a pair with a score equal to a limit stays. Of the pairs within
    the limits, `nearest` keeps those whose place in the order of all scores is nearest to the percentile's,
    (n - 1) p / 100 from 0; of two places as near, the lower one. Raises UserError where a pair has no scores,
    its tokens are not those that were scored, or too few pairs are left.
    """
    given = config.data.filter
    limits, window = limits_of(given), window_of(given)
    if given.scores is None or not (limits or window):
        return pairs, []
    pair_scores = read_pair_scores(given.scores, KEY)
    places = _places(pairs, pair_scores, given.scores)
    columns = pair_scores.of_split(TRAIN)

    def values_of(limit: Limit) -> Floats:
        return np.array([columns[limit.column][place] for place in places], dtype=float)

    kept = np.ones(len(pairs), dtype=bool)
    report = [f"data.filter: scores by model.path={pair_scores.made_with.get('model.path', 'unknown')}"]
    for limit in limits:
        values = values_of(limit)
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
    if window is not None and given.nearest is not None:
        values = values_of(window)
        kept = _nearest(values, kept, window, given.nearest)
        report.append(
            f"data.filter.{window.key}={window.value:g} nearest={given.nearest}: keeps {window.column} from "
            f"{values[kept].min():.6g} to {values[kept].max():.6g}"
        )
    report.append(f"data.filter: {int(kept.sum())} of {len(pairs)} training pairs are kept")
    return pairs.take(np.flatnonzero(kept).tolist()), report


def _nearest(values: Floats, within: Mask, window: Limit, num: int) -> Mask:
    """Which pairs of `within` are the `num` nearest to the percentile, by place in the order of all
    values."""
    there = int(within.sum())
    if num > there:
        raise UserError(
            f"data.filter.nearest={num}: there are only {there} training pairs to choose from; "
            f"type data.filter.nearest={there} or less"
        )
    order = np.argsort(values, kind="stable")
    place = np.empty(len(values))
    place[order] = np.arange(len(values))
    distance = np.abs(place - (len(values) - 1) * window.value / 100)
    nearest_first = [idx for idx in order[np.argsort(distance[order], kind="stable")] if within[idx]]
    kept = np.zeros(len(values), dtype=bool)
    kept[nearest_first[:num]] = True
    return kept


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
