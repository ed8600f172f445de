"""Mismatched pairs: one pair's prompt with another's responses, token by token, and cut to the limit."""

import pytest

from helpers.tiny_models import make_pairs
from rcpo.data.batch import width
from rcpo.data.mismatched import Mismatch, MismatchedPairs, longest_mismatched
from rcpo.data.packer import pack
from rcpo.data.pairs import TokenizedPair, TokenizedSide

PAIRS = pack(
    [
        TokenizedPair(TokenizedSide([1, 10, 11, 2], 2), TokenizedSide([1, 10, 12, 13, 2], 2), row=7),
        TokenizedPair(TokenizedSide([1, 20, 21, 22, 2], 3), TokenizedSide([1, 20, 21, 23, 2], 3), row=9),
    ]
)


def test_prompt_and_responses_by_hand() -> None:
    """Prompts [1, 10] and [1, 20, 21]; what is left of each row is the response."""
    there, back = MismatchedPairs(PAIRS, [Mismatch(0, 1), Mismatch(1, 0)], 100)
    assert (there.chosen, there.rejected) == (
        TokenizedSide([1, 10, 22, 2], 2),
        TokenizedSide([1, 10, 23, 2], 2),
    )
    assert back.chosen == TokenizedSide([1, 20, 21, 11, 2], 3)
    assert back.rejected == TokenizedSide([1, 20, 21, 12, 13, 2], 3)
    assert (there.row, back.row, back.weight) == (7, 9, 1.0)


def test_a_response_is_cut_to_what_the_prompt_leaves() -> None:
    (back,) = MismatchedPairs(PAIRS, [Mismatch(1, 0)], 5)
    assert back.chosen == TokenizedSide([1, 20, 21, 11, 2], 3)
    assert back.rejected == TokenizedSide([1, 20, 21, 12, 13], 3)


@pytest.mark.parametrize("max_length", [9, 100])
def test_widths_and_slices_are_those_of_the_items(max_length: int) -> None:
    packed = pack(make_pairs(12, seed=2))
    which = [Mismatch(idx, (5 * idx + 1) % 12) for idx in range(12)]
    mismatched = MismatchedPairs(packed, which, max_length)
    assert mismatched.widths() == [width(pair) for pair in mismatched]
    assert list(mismatched[3:7]) == list(mismatched)[3:7]
    every = MismatchedPairs(packed, [Mismatch(a, b) for a in range(12) for b in range(12)], max_length)
    assert max(every.widths()) == longest_mismatched(packed, max_length)
