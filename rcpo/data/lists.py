"""Lists of responses as pairs: what data.lists makes of a row, and how a list goes through a step.

    best_worst  one pair, of the best and the worst response
    all_pairs   a pair of every two responses of which one is better
    whole       the list itself, for a listwise objective, as `PackedPairs.slots` pairs one after the other

A slot of a list is an ordinary pair: of n responses, sorted best first, slot j has number j as its chosen
side and number n - 1 - j as its rejected one. A side that is not there is `NO_SIDE`, as of a single answer:
the middle one of an odd list, and both of a slot behind the end of a list that is shorter than the longest.
It has no row and no token. So slots are kept, scored and evaluated as pairs are.

A step of lists of more than two needs the two sides of its gradient: the responses that the loss pulls up and
those that it pushes down, which is not a matter of rank. `by_sign` lays slots out so, 2S of them.

Shape legend: L lists, S slots of each, n responses of a list.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rcpo.data.pairs import NO_SIDE, PackedPairs, TokenizedPair, TokenizedSide
from rcpo.objectives.loss import Lists
from rcpo.records.lists import pairs_among
from rcpo.records.record import PreferenceRecord


def num_ties(scores: Sequence[float]) -> int:
    """Of sorted scores: how many of all twos are equal."""
    return sum(one == other for one, other in itertools.combinations(scores, 2))


def pairs_of_list(
    sides: Sequence[TokenizedSide], record: PreferenceRecord, lists: str
) -> list[TokenizedPair]:
    """What `lists` (data.lists) makes of a record's responses, the best first."""
    row, weight, scores, num = record.row, record.weight, record.scores, len(sides)
    of = record.of_responses
    if lists != "whole":
        return [
            TokenizedPair(
                sides[both[0]], sides[both[1]], row, weight if of is None else of.of(both),
                spread=None if of is None else of.spread(both),
            )
            for both in pairs_among(scores, lists)
        ]  # fmt: skip
    spread = None if of is None else of.spread(range(num))
    slots = [
        TokenizedPair(
            sides[best], sides[num - 1 - best], row, weight, (scores[best], scores[num - 1 - best]),
            spread=spread,
        )
        for best in range(num // 2)
    ]  # fmt: skip
    if num % 2:
        middle = num // 2
        slots.append(TokenizedPair(sides[middle], NO_SIDE, row, weight, (scores[middle], 0.0), spread=spread))
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


def lists_of(pairs: Sequence[TokenizedPair], num_slots: int) -> Lists:
    """Which of these pairs, whole lists of `num_slots` slots each, make a list; on the CPU."""
    own = [pairs[first : first + num_slots] for first in range(0, len(pairs), num_slots)]
    nums = [sum(len(slot.sides) for slot in slots) for slots in own]
    width = max(nums)
    order = torch.zeros(len(own), width, dtype=torch.int64)
    scores = torch.zeros(len(own), width)
    for number, (slots, num) in enumerate(zip(own, nums, strict=True)):
        for place in range(num):
            is_chosen = place < num - num // 2
            slot = place if is_chosen else num - 1 - place
            order[number, place] = slot if is_chosen else num_slots + slot
            of_slot = slots[slot].scores
            assert of_slot is not None
            scores[number, place] = of_slot[0 if is_chosen else 1]
    there = torch.arange(width) < torch.tensor(nums)[:, None]
    return Lists(order, there, scores)


class BySign(NamedTuple):
    """Lists with what is pulled up on the chosen side and what is pushed down on the rejected one: L lists of
    2S slots."""

    pairs: list[TokenizedPair]
    lists: Lists
    places: Tensor
    """(4LS,) int64 of all sides, chosen ones first: which of the former 2LS sides each is; 2LS where nothing
    is."""


def by_sign(pairs: Sequence[TokenizedPair], lists: Lists, is_up: Tensor) -> BySign:
    """`pairs`, which make `lists`, laid out anew; `is_up` (2LS,) bool says of each side, chosen ones first,
    whether its response is pulled up. The best of those is beside the worst of the others, and so on: two
    sides of a slot that are both there share their prompt's row where rows are joined."""
    num_lists, num_slots = len(lists.order), len(pairs) // len(lists.order)
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    made, order = list[TokenizedPair](), torch.zeros_like(lists.order)
    places = torch.full((2, num_lists * 2 * num_slots), len(sides))
    for number in range(num_lists):
        old = [
            column % num_slots + number * num_slots + (column >= num_slots) * len(pairs)
            for column in lists.order[number, : int(lists.there[number].sum())].tolist()
        ]
        ups = [rank for rank, place in enumerate(old) if is_up[place]]
        downs = [rank for rank, place in enumerate(old) if not is_up[place]][::-1]
        kept = [[NO_SIDE] * 2 * num_slots for _ in range(2)]
        for which, ranks in enumerate((ups, downs)):
            for slot, rank in enumerate(ranks):
                order[number, rank] = which * 2 * num_slots + slot
                places[which, number * 2 * num_slots + slot] = old[rank]
                kept[which][slot] = sides[old[rank]]
        first = pairs[number * num_slots]
        made += [
            TokenizedPair(up, down, first.row, first.weight, spread=first.spread)
            for up, down in zip(*kept, strict=True)
        ]
    return BySign(made, lists._replace(order=order), places.flatten())
