"""Pairs as flat arrays: the same pairs as lists, cut and picked, and the same batches."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from rcpo.data.batch import PairBatch, collate
from rcpo.data.joint import collate_joint
from rcpo.data.packer import Packer, pack
from rcpo.data.pairs import PackedPairs, TokenizedPair, TokenizedSide

PAIRS = [
    TokenizedPair(TokenizedSide([1, 5, 6], 2), TokenizedSide([1, 5, 70000, 8], 2), 4, weight=0.1),
    TokenizedPair(TokenizedSide([1, 2, 3, 4, 5], 1), TokenizedSide([1, 9], 1), 7),
    TokenizedPair(TokenizedSide([3, 3], 1), TokenizedSide([3, 4], 1), 9, weight=0.0),
]


def test_packed_pairs_are_the_pairs() -> None:
    """In order, with split, row and weight; each id is a Python number in a list."""
    packed = pack(PAIRS)
    assert packed == PAIRS
    assert (len(packed), packed[1], packed[-1]) == (3, PAIRS[1], PAIRS[2])
    assert packed[0].chosen.input_ids == [1, 5, 6]
    assert {type(token) for token in packed[0].chosen.input_ids} == {int}
    assert (type(packed[0].row), type(packed[0].weight)) == (int, float)
    assert PAIRS[0] in packed
    with pytest.raises(IndexError):
        packed[3]
    for other in (PAIRS[:2], PAIRS[::-1], [*PAIRS[:2], TokenizedPair(PAIRS[2].chosen, PAIRS[2].rejected, 8)]):
        assert packed != other


def test_parts_are_packed_one_behind_the_other() -> None:
    """Two, none, one; and nothing at all."""
    packer = Packer()
    for part in (PAIRS[:2], [], PAIRS[2:]):
        packer.add(part)
    assert packer.packed() == PAIRS
    assert Packer().packed() == []
    assert pack([]).widths() == []


def test_a_choice_shares_the_tokens() -> None:
    packed = pack(PAIRS)
    assert packed[1:] == PAIRS[1:]
    picked = packed.take([2, 0])
    assert picked == [PAIRS[2], PAIRS[0]]
    assert isinstance(picked, PackedPairs)
    assert picked.arrays.ids is packed.arrays.ids
    assert packed.take([]) == []


def test_widths_are_of_the_longer_side_and_look_at_no_id() -> None:
    """4, 5 and 2 tokens, also where the ids are not there."""
    packed = pack(PAIRS)
    assert packed.widths() == [4, 5, 2]
    nothing = np.zeros(0, np.int32)
    assert PackedPairs(packed.arrays._replace(ids=nothing)).widths() == [4, 5, 2]


def test_sides_are_equal_by_what_they_hold() -> None:
    of_list, of_array = PAIRS[0].chosen, pack(PAIRS)[0].chosen
    assert of_array == of_list
    assert hash(of_array) == hash(of_list)
    assert repr(of_array) == "TokenizedSide([1, 5, 6], 2)"
    assert of_array not in (TokenizedSide([1, 5, 6], 1), TokenizedSide([1, 5, 7], 2), [1, 5, 6])


def flat(batch: PairBatch) -> list[Any]:
    """The fields of a batch, those of its segments one by one."""
    return [*batch._replace(segments=None), *(batch.segments or ())]


def test_batches_of_read_only_arrays_are_those_of_lists() -> None:
    """The same tensors of the same types, without torch's warning of memory that must not be written."""
    arrays = pack(PAIRS).arrays
    arrays.ids.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for collated in (
            lambda pairs: collate(pairs, pad_id=0),
            lambda pairs: collate_joint(pairs, 0, share_prefix=True, packing=True),
        ):
            both = (flat(collated(pairs)) for pairs in (PackedPairs(arrays), PAIRS))
            for left, right in zip(*both, strict=True):
                if isinstance(left, torch.Tensor):
                    assert left.dtype == right.dtype
                    assert torch.equal(left, right)
                else:
                    assert left == right
