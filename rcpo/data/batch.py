"""Batches: tokenised pairs on a padded grid, with the positions that predict response tokens worked out on
the CPU.

A pair takes two rows here, a single answer one; `rcpo.data.joint` puts more on a row, and `segments` says who
may see whom.

Shape legend: B pairs, R rows (2B: 0..B-1 chosen, B..2B-1 rejected, without those that are missing, but at
least one a side; B or 1 in a joint layout), T padded tokens a row, N response tokens of the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcpo.data.pairs import NO_SIDE, TokenizedPair, TokenizedSide
from rcpo.data.pictures import Pixels, pixels_of
from rcpo.ranks.transfer import to_device

PREFIX, OF_CHOSEN, OF_REJECTED = 0, 1, 2
PADDING = -1
NO_IDS = torch.zeros(0, dtype=torch.int64)


class Segments(NamedTuple):
    """Which pair and which part of it each token of a joint layout belongs to. A token sees those before it
    of its own part, and of its pair's shared prefix."""

    pair: Tensor
    """(R, T) int64: the pair's number in the batch, `PADDING` where there is none."""
    part: Tensor
    """(R, T) int64: `PREFIX`, `OF_CHOSEN` or `OF_REJECTED`; `PADDING` where there is none."""
    starts: Tensor | None = None
    """(sides + 1,) int32, on one row without shared prefixes: where each sequence begins, and the row's
    end."""
    longest: int = 0
    """Tokens of the longest of these sequences."""

    def to(self, device: torch.device) -> "Segments":
        starts = _moved(self.starts, device)
        return Segments(to_device(self.pair, device), to_device(self.part, device), starts, self.longest)

    def seen(self) -> Tensor:
        """(R, T, T) bool: whether the token of a row may see the token of a column."""
        same_pair = self.pair[:, :, None] == self.pair[:, None, :]
        same_part = self.part[:, :, None] == self.part[:, None, :]
        return (same_pair & (same_part | (self.part[:, None, :] == PREFIX))).tril()


class Present(NamedTuple):
    """Of the B pairs of a batch; known on the CPU."""

    chosen: int
    rejected: int
    both: int


def present_in(lengths: Tensor) -> Present | None:
    """Of sides of these (2B,) tokens, on the CPU; None where all are there."""
    has_w, has_l = (lengths > 0).chunk(2)
    if bool((has_w & has_l).all()):
        return None
    return Present(int(has_w.sum()), int(has_l.sum()), int((has_w & has_l).sum()))


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
    """(2B,) int64: |y|, response tokens per side, 0 where it is missing; chosen sides first."""
    num_chosen_tokens: int
    """How many of the N tokens belong to chosen sides."""
    position_ids: Tensor | None = None
    """(R, T) int64 in a joint layout: each side counts from its own start."""
    segments: Segments | None = None
    """Who may see whom in a joint layout."""
    ref_token_logps: Tensor | None = None
    """(N,) fp32: the reference's log-probability of each target, where the objective weighs tokens."""
    token_weights: Tensor | None = None
    """(N,) fp32: what each target counts in z; None: 1."""
    gives_log_weights: bool = False
    """Whether a pass tells how likely the responses are to the model (WPO's weights)."""
    expert_costs: Tensor | None = None
    """(E,) fp32: what the router's summed probability of each expert costs, where a pass is to tell that."""
    present: Present | None = None
    """How many responses are there; None: all of them."""
    pixels: Pixels | None = None
    """What the prompts show; None where no prompt has an image."""

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(
            input_ids=to_device(self.input_ids, device),
            token_positions=to_device(self.token_positions, device),
            targets=to_device(self.targets, device),
            lengths=to_device(self.lengths, device),
            num_chosen_tokens=self.num_chosen_tokens,
            position_ids=_moved(self.position_ids, device),
            segments=None if self.segments is None else self.segments.to(device),
            ref_token_logps=_moved(self.ref_token_logps, device),
            token_weights=_moved(self.token_weights, device),
            gives_log_weights=self.gives_log_weights,
            expert_costs=_moved(self.expert_costs, device),
            present=self.present,
            pixels=None if self.pixels is None else self.pixels.to(device),
        )

    def side(self, chosen: bool) -> "PairBatch":
        """The rows of one side alone, (B, T), on the same grid, whose experts cost nothing; not of a joint
        layout."""
        assert self.segments is None
        num_pairs, width = self.num_pairs, self.input_ids.shape[1]
        num_rows = num_pairs if self.present is None else max(1, self.present.chosen)
        num_chosen = self.num_chosen_tokens
        pixels = None if self.pixels is None else self.pixels.of_side()
        if chosen:
            return PairBatch(
                self.input_ids[:num_rows],
                self.token_positions[:num_chosen],
                self.targets[:num_chosen],
                self.lengths[:num_pairs],
                num_chosen,
                ref_token_logps=_part(self.ref_token_logps, slice(num_chosen)),
                token_weights=_part(self.token_weights, slice(num_chosen)),
                gives_log_weights=self.gives_log_weights,
                pixels=pixels,
            )
        return PairBatch(
            self.input_ids[num_rows:],
            self.token_positions[num_chosen:] - num_rows * width,
            self.targets[num_chosen:],
            self.lengths[num_pairs:],
            0,
            ref_token_logps=_part(self.ref_token_logps, slice(num_chosen, None)),
            token_weights=_part(self.token_weights, slice(num_chosen, None)),
            gives_log_weights=self.gives_log_weights,
            pixels=pixels,
        )

    @property
    def num_pairs(self) -> int:
        return len(self.lengths) // 2

    @property
    def response_mask(self) -> Tensor:
        """(2B, T) bool: True at response tokens; not of a joint layout."""
        assert self.segments is None
        mask = torch.zeros(self.input_ids.numel(), dtype=torch.bool, device=self.input_ids.device)
        mask[self.token_positions + 1] = True
        return mask.view_as(self.input_ids)


def width(pair: TokenizedPair) -> int:
    """Tokens of the longer side."""
    return max(pair.chosen.num_tokens, pair.rejected.num_tokens)


def _part(tensor: Tensor | None, which: slice) -> Tensor | None:
    return None if tensor is None else tensor[which]


def tail_weights(lengths: Tensor, alpha: float) -> Tensor:
    """(N,) fp32 of responses of these (2B,) tokens on the CPU, chosen ones first: 1 for a token within the
    length of its pair's shorter response, `alpha` past it. LD-DPO, Liu et al. 2024 (arXiv 2409.06411)."""
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    weights = []
    for num_tokens, num_shared in zip(lengths.tolist(), shorter.tolist(), strict=True):
        weights += [torch.ones(num_shared), torch.full((num_tokens - num_shared,), alpha)]
    return torch.cat(weights)


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else to_device(tensor, device)


def collate(pairs: Sequence[TokenizedPair], pad_id: int) -> PairBatch:
    """Put pairs on one grid, padded with `pad_id` to the longest row. Here `chosen`/`rejected` become rows w
    and l."""
    both = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    lengths = torch.tensor([side.num_scored for of_side in both for side in of_side])
    # A side of which nothing is there keeps a row of padding, so that it can go through the model alone.
    sides = [side for of_side in both for side in _rows_of(of_side)]
    width = max(1, *(side.num_tokens for side in sides))
    input_ids = torch.full((len(sides), width), pad_id, dtype=torch.int64)
    positions, targets = [NO_IDS], [NO_IDS]
    for row, side in enumerate(sides):
        if not side.num_tokens:
            continue
        input_ids[row, : side.num_tokens] = torch.tensor(side.ids)
        places = torch.from_numpy(side.scored_at)
        positions.append(places - 1 + row * width)
        targets.append(input_ids[row, places])
    return PairBatch(
        input_ids=input_ids,
        token_positions=torch.cat(positions),
        targets=torch.cat(targets),
        lengths=lengths,
        num_chosen_tokens=int(lengths[: len(pairs)].sum()),
        present=present_in(lengths),
        pixels=pixels_of(pairs),
    )


def collate_sides(sides: Sequence[TokenizedSide], pad_id: int) -> PairBatch:
    """B responses without others beside them, some of which may be `NO_SIDE`, on one grid: as one side of a
    batch."""
    pairs = [TokenizedPair(side, NO_SIDE, row) for row, side in enumerate(sides)]
    return collate(pairs, pad_id).side(chosen=True)


def prompt_as_response(side: TokenizedSide) -> TokenizedSide:
    """The prompt's tokens from the second on, which a model predicts, behind its first; `NO_SIDE` where there
    are none."""
    return TokenizedSide(side.ids[: side.num_prompt], 1) if side.num_prompt > 1 else NO_SIDE


def _rows_of(sides: Sequence[TokenizedSide]) -> Sequence[TokenizedSide]:
    return [side for side in sides if side.num_tokens] or sides[:1]
