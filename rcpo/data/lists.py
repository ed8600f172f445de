"""Lists of responses as pairs: what data.lists makes of a row, and how a list goes through a step.

    best_worst  one pair, of the best and the worst response
    all_pairs   a pair of every two responses of which one is better
    whole       the list itself, for a listwise objective, as `PackedPairs.slots` pairs one after the other

A slot of a list is an ordinary pair: of n responses, sorted best first, slot j has number j as its chosen
side and number n - 1 - j as its rejected one. A side that is not there is `NO_SIDE`, as of a single answer:
the middle one of an odd list, and both of a slot behind the end of a list that is shorter than the longest.
It has no row and no token. So slots are kept, scored and evaluated as pairs are.

Shape legend: L lists, S slots of each, n responses of a list.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from rcpo.data.pairs import NO_SIDE, PackedPairs, TokenizedPair, TokenizedSide
from rcpo.records.record import PreferenceRecord


def num_ties(scores: Sequence[float]) -> int:
    """Of sorted scores: how many of all twos are equal."""
    return sum(one == other for one, other in itertools.combinations(scores, 2))


def pairs_of_list(sides: Sequence[TokenizedSide], record: PreferenceRecord, lists: str) -> list[TokenizedPair]:
    """What `lists` (data.lists) makes of a record's responses, the best first."""
    row, weight, scores, num = record.row, record.weight, record.scores, len(sides)
    if lists == "best_worst":
        return [TokenizedPair(sides[0], sides[-1], row, weight)]
    if lists == "all_pairs":
        return [
            TokenizedPair(sides[better], sides[worse], row, weight)
            for better, worse in itertools.combinations(range(num), 2)
            if scores[better] > scores[worse]
        ]
    slots = [
        TokenizedPair(sides[best], sides[num - 1 - best], row, weight, (scores[best], scores[num - 1 - best]))
        for best in range(num // 2)
    ]
    if num % 2:
        slots.append(TokenizedPair(sides[num // 2], NO_SIDE, row, weight, (scores[num // 2], 0.0)))
    return slots


def weighed_by_row(pairs: PackedPairs, nums: Sequence[int]) -> PackedPairs:
    """The pairs with weights by which each row counts alike, however many pairs it has: the mean number of
    pairs of a row over the row's own. Their mean is 1, and all are where rows are of one length. `nums` are
    the rows' numbers of pairs, in their order."""
    share = len(pairs) / len(nums) / np.repeat(nums, nums) if len(nums) else np.ones(0)
    return PackedPairs(pairs.arrays._replace(weights=pairs.arrays.weights * share))


def listed(pairs: PackedPairs, places: Sequence[Sequence[int]]) -> PackedPairs:
    """Lists of one number of slots, from the places of each row's own slots: shorter lists end in empty ones.
    A row that is a pair is a list of two, with scores 1 and 0."""
    num_slots = max(map(len, places))
    order = np.array([[*own, *[own[0]] * (num_slots - len(own))] for own in places]).reshape(-1)
    is_there = np.array([[slot < len(own) for slot in range(num_slots)] for own in places]).reshape(-1, 1)
    of = pairs.take(order.tolist()).arrays
    of_pair = np.array([1, 0], dtype=np.float32)
    scores = np.where(np.isnan(of.scores), of_pair, of.scores) * is_there
    return PackedPairs(
        of._replace(lengths=of.lengths * is_there, num_prompt=of.num_prompt * is_there, scores=scores)
    )
