"""Batches: tokenised pairs on a padded grid, with the positions that predict response tokens worked out on
the CPU.

A pair takes two rows, or with a shared prefix one: prompt, chosen response, rejected response, where
`segments` says who may see whom.

Shape legend: B pairs, R rows (2B: 0..B-1 chosen, B..2B-1 rejected; B with shared prefixes), T padded tokens a
row, N response tokens of the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcpo.data.tokenize import TokenizedPair


class PairBatch(NamedTuple):
    """B pairs as tensors. Rows are padded on the right, so that no attention mask is needed under causal
    attention but where prefixes are shared."""

    input_ids: Tensor
    """(R, T) int64."""
    token_positions: Tensor
    """(N,) int64: where in the flattened (R * T) grid each response token is *predicted*, by the token before
    it; side by side, so all chosen tokens come before all rejected ones."""
    targets: Tensor
    """(N,) int64: the response tokens, in the order of `token_positions`."""
    lengths: Tensor
    """(2B,) int64: |y|, response tokens per side, at least 1; chosen sides first."""
    num_chosen_tokens: int
    """How many of the N tokens belong to chosen sides."""
    position_ids: Tensor | None = None
    """(R, T) int64 with shared prefixes: both responses go on from where the prefix ends."""
    segments: Tensor | None = None
    """(R, T) int64 with shared prefixes: 0 prefix, 1 chosen, 2 rejected, 3 padding. A token sees those before
    it that are of its own segment or of the prefix."""
    ref_logps: Tensor | None = None
    """(N,) fp32: the reference's log-probability of each target, where the objective weighs tokens."""

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            token_positions=self.token_positions.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            num_chosen_tokens=self.num_chosen_tokens,
            position_ids=_moved(self.position_ids, device),
            segments=_moved(self.segments, device),
            ref_logps=_moved(self.ref_logps, device),
        )

    def side(self, chosen: bool) -> "PairBatch":
        """The rows of one side alone, (B, T), on the same grid; not with shared prefixes."""
        assert self.segments is None
        num_rows, width = self.num_pairs, self.input_ids.shape[1]
        num_chosen = self.num_chosen_tokens
        if chosen:
            return PairBatch(
                self.input_ids[:num_rows],
                self.token_positions[:num_chosen],
                self.targets[:num_chosen],
                self.lengths[:num_rows],
                num_chosen,
                ref_logps=None if self.ref_logps is None else self.ref_logps[:num_chosen],
            )
        return PairBatch(
            self.input_ids[num_rows:],
            self.token_positions[num_chosen:] - num_rows * width,
            self.targets[num_chosen:],
            self.lengths[num_rows:],
            0,
            ref_logps=None if self.ref_logps is None else self.ref_logps[num_chosen:],
        )

    @property
    def num_pairs(self) -> int:
        return len(self.lengths) // 2

    @property
    def response_mask(self) -> Tensor:
        """(2B, T) bool: True at response tokens; not with shared prefixes."""
        assert self.segments is None
        mask = torch.zeros(self.input_ids.numel(), dtype=torch.bool, device=self.input_ids.device)
        mask[self.token_positions + 1] = True
        return mask.view_as(self.input_ids)


def width(pair: TokenizedPair) -> int:
    """Tokens of the longer side."""
    return max(len(pair.chosen.input_ids), len(pair.rejected.input_ids))


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


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


def collate_shared(pairs: Sequence[TokenizedPair], pad_id: int) -> PairBatch:
    """The same pairs with one row each: what both sides' prompts have in common is there, and computed,
    once."""
    rows = [_shared_row(pair) for pair in pairs]
    width = max(len(row.input_ids) for row in rows)
    input_ids, position_ids, segments = (
        torch.full((len(rows), width), fill, dtype=torch.int64) for fill in (pad_id, 0, PADDING)
    )
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[number, :length] = torch.tensor(row.input_ids)
        position_ids[number, :length] = torch.tensor(row.position_ids)
        segments[number, :length] = torch.tensor(row.segments)
    sides = [side for which in (0, 1) for side in ((pair.chosen, pair.rejected)[which] for pair in pairs)]
    positions = [
        torch.tensor(row.predicted_at[which]) + number * width
        for which in (0, 1)
        for number, row in enumerate(rows)
    ]
    targets = [torch.tensor(side.input_ids[side.num_prompt :]) for side in sides]
    lengths = torch.tensor([len(target) for target in targets])
    return PairBatch(
        input_ids=input_ids,
        token_positions=torch.cat(positions),
        targets=torch.cat(targets),
        lengths=lengths,
        num_chosen_tokens=int(lengths[: len(pairs)].sum()),
        position_ids=position_ids,
        segments=segments,
    )


PREFIX, PADDING = 0, 3


class _SharedRow(NamedTuple):
    input_ids: list[int]
    position_ids: list[int]
    segments: list[int]
    predicted_at: tuple[list[int], list[int]]
    """Per side, the place in the row that predicts each response token."""


def _shared_row(pair: TokenizedPair) -> _SharedRow:
    sides = (pair.chosen, pair.rejected)
    num_shared = shared_prefix(pair)
    ids = list(pair.chosen.input_ids[:num_shared])
    position_ids, segments = list(range(num_shared)), [PREFIX] * num_shared
    predicted_at: tuple[list[int], list[int]] = ([], [])
    for which, side in enumerate(sides):
        start = len(ids) - num_shared  # of a token behind the prefix: its own index plus this
        length = len(side.input_ids)
        ids += side.input_ids[num_shared:]
        position_ids += range(num_shared, length)
        segments += [which + 1] * (length - num_shared)
        predicted_at[which].extend(
            idx if idx < num_shared else idx + start for idx in range(side.num_prompt - 1, length - 1)
        )
    return _SharedRow(ids, position_ids, segments, predicted_at)


def shared_prefix(pair: TokenizedPair) -> int:
    """How many tokens the two sides' prompts have in common from the start."""
    longest = min(pair.chosen.num_prompt, pair.rejected.num_prompt)
    both = zip(pair.chosen.input_ids[:longest], pair.rejected.input_ids[:longest], strict=True)
    return next((idx for idx, (left, right) in enumerate(both) if left != right), longest)
