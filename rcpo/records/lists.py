"""Rows of several responses to one prompt, with a score or a rank of each, and how one becomes a record.

Owns what makes such a row unfit. What is made of it (pairs, or a list as it is) is decided where it is
tokenised (`rcpo.data.tokenize`). Called by `rcpo.records.load`.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from rcpo.records.messages import spelled
from rcpo.records.record import BadRowError, PreferenceRecord, read_record
from rcpo.records.weights import PROBABILITIES, ResponseWeights

LISTED = ("responses", "scores", "ranks")
"""Columns of a list: its responses, and scores (the highest is best) or ranks (the lowest is best)."""
MOST = 16
"""Responses of a row."""


def read_list(
    prompt: Any,
    responses: Any,
    scores: Any,
    ranks: Any,
    row: int,
    tools: Any = None,
    documents: Any = None,
    template_kwargs: Any = None,
    probabilities: Any = None,
    weigh: Callable[[Sequence[Any]], ResponseWeights] | None = None,
) -> PreferenceRecord:
    """Turn a row into a record, best response first: chosen is the best one, rejected the worst one.

    Responses are what chosen and rejected may be, text or messages; lists may be written as text, in JSON or
    as Python writes them. Of ranks the scores are their negatives. Of equal scores the order is that of the
    responses' text, so that it does not matter in which order a row has them. `weigh` makes weights of the
    `probabilities` of its responses. Raises BadRowError."""
    found = _list_of("responses", responses)
    if not 2 <= len(found) <= MOST:
        raise BadRowError(f"there are {len(found)} responses; a list has from 2 to {MOST}")
    values = _scores_of(scores, ranks, len(found))
    if len(set(values)) == 1:
        raise BadRowError("all responses are scored alike, so that none is better")
    order = sorted(range(len(found)), key=lambda idx: (-values[idx], json.dumps(found[idx], default=str)))
    best, *others = (found[idx] for idx in order)
    try:
        records = [
            read_record(prompt, best, other, row, tools, documents, template_kwargs) for other in others
        ]
    except BadRowError as error:
        raise BadRowError(_of_responses(str(error))) from None
    first, last = records[0], records[-1]
    if any((each.prompt, each.chosen) != (first.prompt, first.chosen) for each in records):
        raise BadRowError("the responses do not share one prompt")
    record = dataclasses.replace(
        last,
        between=tuple(each.rejected for each in records[:-1]),
        scores=tuple(values[idx] for idx in order),
    )
    said = [json.dumps(response) for response in record.responses]
    if len(set(said)) < len(said):
        raise BadRowError("two responses are identical")
    if weigh is None:
        return record
    given = _list_of(PROBABILITIES, probabilities)
    if len(given) != len(found):
        raise BadRowError(f"there are {len(given)} {PROBABILITIES} of {len(found)} responses")
    weights = weigh([given[idx] for idx in order])
    return dataclasses.replace(record, of_responses=weights, weight=weights.of(range(len(found))))


def pairs_among(scores: Sequence[float], lists: str) -> list[tuple[int, int]]:
    """Places of the better and the worse response of each pair that `lists` (data.lists: best_worst or
    all_pairs) makes of a list with these scores, the best first."""
    if lists == "best_worst":
        return [(0, len(scores) - 1)]
    both = itertools.combinations(range(len(scores)), 2)
    return [(better, worse) for better, worse in both if scores[better] > scores[worse]]


def num_pairs(record: PreferenceRecord, lists: str) -> int:
    """How many training pairs `lists` (data.lists) makes of a record; a whole list counts as one."""
    if lists != "all_pairs" or not record.scores:
        return 1
    return len(pairs_among(record.scores, lists))


def weights_made(record: PreferenceRecord, lists: str) -> list[float]:
    """Of what `lists` (data.lists) makes of a record: of each pair where responses have weights of their own,
    else the record's."""
    if record.of_responses is None or not record.scores or lists == "whole":
        return [record.weight]
    return [record.of_responses.of(places) for places in pairs_among(record.scores, lists)]


def _scores_of(scores: Any, ranks: Any, num: int) -> list[float]:
    if (scores is None) == (ranks is None):
        raise BadRowError(
            "scores and ranks are both null" if scores is None else "there are scores and ranks"
        )
    name, sign = ("ranks", -1.0) if scores is None else ("scores", 1.0)
    values = _list_of(name, ranks if scores is None else scores)
    if len(values) != num:
        raise BadRowError(f"there are {len(values)} {name} of {num} responses")
    try:
        numbers = [math.nan if isinstance(value, bool) else float(value) for value in values]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise BadRowError(f"one of the {name} is not a finite number")
    return [sign * number for number in numbers]


def _list_of(name: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        value = spelled(value)
    if value is None:
        raise BadRowError(f"{name} is null, or text that is no list")
    if not isinstance(value, list | tuple):
        raise BadRowError(f"{name} is {type(value).__name__}, not a list")
    return list(value)


def _of_responses(reason: str) -> str:
    """What is wrong with a pair, in words of a list."""
    for pair, listed in (("the sides are", "two responses are"), ("one side is", "one response is")):
        reason = reason.replace(pair, listed)
    for side in ("chosen", "rejected"):
        reason = f"a response{reason.removeprefix(side)}" if reason.startswith(f"{side} ") else reason
    return reason.replace("sides", "responses")
