"""Batches: tokenised pairs on a padded grid, with the positions that predict response tokens worked out on
the CPU.

Shape legend: B pairs (2B rows: 0..B-1 chosen, B..2B-1 rejected), T padded tokens a row, N response tokens of
the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcpo.data.tokenize import TokenizedPair


class PairBatch(NamedTuple):
    """B pairs as tensors. Rows are padded on the right, so that no attention mask is needed under causal
    attention."""

    input_ids: Tensor
    """(2B, T) int64."""
    token_positions: Tensor
    """(N,) int64: where in the flattened (2B * T) grid each response token is *predicted*, one left of its
    own place; row by row, so all chosen tokens come before all rejected ones."""
    targets: Tensor
    """(N,) int64: the response tokens, in the order of `token_positions`."""
    lengths: Tensor
    """(2B,) int64: |y|, response tokens per row, at least 1."""
    num_chosen_tokens: int
    """How many of the N tokens belong to chosen rows."""

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            token_positions=self.token_positions.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            num_chosen_tokens=self.num_chosen_tokens,
        )

    def side(self, chosen: bool) -> "PairBatch":
        """The rows of one side alone, (B, T), on the same grid."""
        num_rows, width = self.num_pairs, self.input_ids.shape[1]
        num_chosen = self.num_chosen_tokens
        if chosen:
            return PairBatch(
                self.input_ids[:num_rows],
                self.token_positions[:num_chosen],
                self.targets[:num_chosen],
                self.lengths[:num_rows],
                num_chosen,
            )
        return PairBatch(
            self.input_ids[num_rows:],
            self.token_positions[num_chosen:] - num_rows * width,
            self.targets[num_chosen:],
            self.lengths[num_rows:],
            0,
        )

    @property
    def num_pairs(self) -> int:
        return self.input_ids.shape[0] // 2

    @property
    def response_mask(self) -> Tensor:
        """(2B, T) bool: True at response tokens."""
        mask = torch.zeros(self.input_ids.numel(), dtype=torch.bool, device=self.input_ids.device)
        mask[self.token_positions + 1] = True
        return mask.view_as(self.input_ids)


def collate(pairs: Sequence[TokenizedPair], pad_id: int) -> PairBatch:
    """Put pairs on one grid, padded with `pad_id` to the longest row. Here `chosen`/`rejected` become rows w
    and l."""
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    width = max(len(side.input_ids) for side in sides)
    input_ids = torch.full((len(sides), width), pad_id, dtype=torch.int64)
    positions, targets = [], []
    for row, side in enumerate(sides):
        input_ids[row, : len(side.input_ids)] = torch.tensor(side.input_ids)
        positions.append(torch.arange(side.num_prompt - 1, len(side.input_ids) - 1) + row * width)
        targets.append(input_ids[row, side.num_prompt : len(side.input_ids)])
    lengths = torch.tensor([len(target) for target in targets])
    return PairBatch(
        input_ids=input_ids,
        token_positions=torch.cat(positions),
        targets=torch.cat(targets),
        lengths=lengths,
        num_chosen_tokens=int(lengths[: len(pairs)].sum()),
    )
