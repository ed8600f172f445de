"""Pairs on a padded grid, against plain loops over the pairs; log-probs under padding are in
test_logprobs.py."""

import pytest
import torch

from helpers.tiny_models import make_pairs
from rcpo.data.batch import PairBatch, collate
from rcpo.data.tokenize import TokenizedPair, TokenizedSide


def sides(pairs: list[TokenizedPair]) -> list[TokenizedSide]:
    """In the order of the grid's rows."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def test_two_pairs_by_hand() -> None:
    """Width 4. Row 0 = 1 2|3, row 1 = 1|4 5 6, row 2 = 1 2|7 8, row 3 = 1|9.

    Response tokens are predicted one place to the left, in the flattened grid: 1 | 4 5 6 | 9 10 | 12.
    """
    pairs = [
        TokenizedPair(TokenizedSide([1, 2, 3], 2), TokenizedSide([1, 2, 7, 8], 2), 0),
        TokenizedPair(TokenizedSide([1, 4, 5, 6], 1), TokenizedSide([1, 9], 1), 1),
    ]
    batch = collate(pairs, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [1, 4, 5, 6], [1, 2, 7, 8], [1, 9, 0, 0]]
    assert batch.token_positions.tolist() == [1, 4, 5, 6, 9, 10, 12]
    assert batch.targets.tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert batch.lengths.tolist() == [1, 3, 2, 1]
    assert (batch.num_pairs, batch.num_chosen_tokens) == (2, 4)
    assert batch.response_mask.tolist() == [
        [False, False, True, False],
        [False, True, True, True],
        [False, False, True, True],
        [False, True, False, False],
    ]


@pytest.mark.parametrize("num_pairs", [1, 2, 7])
def test_every_response_token_is_a_target_once_and_nothing_else_is(num_pairs: int) -> None:
    pairs = make_pairs(num_pairs, seed=4)
    batch = collate(pairs, pad_id=0)
    responses = [side.input_ids[side.num_prompt :] for side in sides(pairs)]
    assert batch.targets.tolist() == [token for response in responses for token in response]
    assert batch.lengths.tolist() == [len(response) for response in responses]
    assert batch.num_chosen_tokens == sum(map(len, responses[:num_pairs]))
    # What stands one place right of where a token is predicted, on the grid, is that token.
    assert torch.equal(batch.input_ids.flatten()[batch.token_positions + 1], batch.targets)
    for row, side in enumerate(sides(pairs)):
        expected = [
            side.num_prompt <= place < len(side.input_ids) for place in range(batch.input_ids.shape[1])
        ]
        assert batch.response_mask[row].tolist() == expected


def test_padding_is_on_the_right_and_its_id_is_no_target() -> None:
    """Another pad id, also one that responses hold, changes the padding alone."""
    pairs = make_pairs(5, seed=6)
    token = pairs[0].chosen.input_ids[-1]
    plain, other = collate(pairs, pad_id=0), collate(pairs, pad_id=token)
    for mine, theirs in zip(plain[1:4], other[1:4], strict=True):
        assert torch.equal(mine, theirs)
    for row, side in enumerate(sides(pairs)):
        length = len(side.input_ids)
        assert other.input_ids[row, :length].tolist() == side.input_ids
        assert set(other.input_ids[row, length:].tolist()) <= {token}
    assert plain.input_ids.shape[1] == max(len(side.input_ids) for side in sides(pairs))


def test_a_pair_has_the_same_rows_in_any_batch() -> None:
    """Alone, and as the third of five, up to padding."""
    pairs = make_pairs(5, seed=8)
    together, alone = collate(pairs, pad_id=0), collate(pairs[2:3], pad_id=0)
    width = alone.input_ids.shape[1]
    for mine, theirs in (
        (together.input_ids, alone.input_ids),
        (together.response_mask, alone.response_mask),
    ):
        assert torch.equal(mine[[2, 7], :width], theirs)
    assert together.response_mask[[2, 7], width:].sum() == 0
    assert together.lengths[[2, 7]].tolist() == alone.lengths.tolist()


def test_a_batch_moves_whole() -> None:
    """To the meta device, as to any: every tensor, and the count as it was."""
    batch = collate(make_pairs(3), pad_id=0)
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, PairBatch)
    assert {tensor.device.type for tensor in moved[:4]} == {"meta"}
    assert [tensor.shape for tensor in moved[:4]] == [tensor.shape for tensor in batch[:4]]
    assert moved.num_chosen_tokens == batch.num_chosen_tokens
    assert {tensor.dtype for tensor in batch[:4]} == {torch.int64}
