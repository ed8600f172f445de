"""Layouts that waste less: a prompt computed once for both responses, and a micro-batch on one row.

They need attention that follows `PairBatch.segments` (`rcpo.models.load`). z and gradients are those of
`rcpo.data.batch.collate`, to rounding. Called by `rcpo.training.loop` and `rcpo.training.rehearsal`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from rcpo.config.schema import TrainConfig
from rcpo.data.batch import OF_CHOSEN, OF_REJECTED, PADDING, PREFIX, PairBatch, Segments, collate, present_in
from rcpo.data.pictures import pixels_of
from rcpo.data.tokenize import TokenizedPair


def lay_out(config: TrainConfig, pairs: Sequence[TokenizedPair], pad_id: int, may_join: bool) -> PairBatch:
    """The pairs as `train.share_prefix` and `train.packing` say; as two padded rows each where they must not
    be joined."""
    if may_join and (config.share_prefix or config.packing):
        return collate_joint(pairs, pad_id, config.share_prefix, config.packing)
    return collate(pairs, pad_id)


def collate_joint(
    pairs: Sequence[TokenizedPair], pad_id: int, share_prefix: bool, packing: bool
) -> PairBatch:
    """One row a pair, or with `packing` one row in all, without padding. With `share_prefix` what a pair's
    prompts have in common is there once, its images among it."""
    pixels = pixels_of(pairs)
    assert pixels is None or share_prefix, "each side's images in turn is an order that nothing needs"
    strips = [_strip(pair, share_prefix) for pair in pairs]
    lengths = [len(strip.input_ids) for strip in strips]
    if packing:
        num_rows, width = 1, sum(lengths)
        starts = [sum(lengths[:number]) for number in range(len(pairs))]
    else:  # a pair of which nothing is there has no row
        num_rows, width = sum(map(bool, lengths)), max(lengths)
        starts = [sum(map(bool, lengths[:number])) * width for number in range(len(pairs))]
    input_ids, position_ids, pair_of, part_of = (
        torch.full((num_rows * width,), fill, dtype=torch.int64) for fill in (pad_id, 0, PADDING, PADDING)
    )
    for number, (start, length, strip) in enumerate(zip(starts, lengths, strips, strict=True)):
        place = slice(start, start + length)
        input_ids[place] = torch.tensor(strip.input_ids)
        position_ids[place] = torch.tensor(strip.position_ids)
        pair_of[place] = number
        part_of[place] = torch.tensor(strip.parts)
    positions = [
        torch.tensor(strip.predicted_at[which], dtype=torch.int64) + start
        for which in (0, 1)
        for start, strip in zip(starts, strips, strict=True)
    ]
    sides = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    targets = [
        torch.tensor(side.input_ids, dtype=torch.int64)[torch.from_numpy(side.scored_at)] for side in sides
    ]
    num_targets = torch.tensor([len(target) for target in targets])
    return PairBatch(
        input_ids=input_ids.view(num_rows, width),
        token_positions=torch.cat(positions),
        targets=torch.cat(targets),
        lengths=num_targets,
        num_chosen_tokens=int(num_targets[: len(pairs)].sum()),
        position_ids=position_ids.view(num_rows, width),
        segments=Segments(
            pair_of.view(num_rows, width),
            part_of.view(num_rows, width),
            *(_sequences(pairs) if packing and not share_prefix else ()),
        ),
        present=present_in(num_targets),
        pixels=None if pixels is None else pixels.of_side(),
    )


def _sequences(pairs: Sequence[TokenizedPair]) -> tuple[torch.Tensor, int]:
    """Where the sides begin on one row, each pair's chosen before its rejected, and the longest's tokens."""
    lengths = torch.tensor([side.num_tokens for pair in pairs for side in pair.sides])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return starts, int(lengths.max())


class _Strip(NamedTuple):
    """A pair's tokens one after the other."""

    input_ids: list[int]
    position_ids: list[int]
    parts: list[int]
    """Of each token: `PREFIX`, `OF_CHOSEN` or `OF_REJECTED`."""
    predicted_at: tuple[list[int], list[int]]
    """Per side, the place in the strip that predicts each response token."""


def _strip(pair: TokenizedPair, share_prefix: bool) -> _Strip:
    num_shared = shared_prefix(pair) if share_prefix else 0
    ids = list(pair.chosen.input_ids[:num_shared])
    position_ids, parts = list(range(num_shared)), [PREFIX] * num_shared
    predicted_at: tuple[list[int], list[int]] = ([], [])
    for which, side in enumerate((pair.chosen, pair.rejected)):
        start = len(ids) - num_shared  # of a token behind the prefix: its own index plus this
        length = len(side.input_ids)
        ids += side.input_ids[num_shared:]
        position_ids += range(num_shared, length)
        parts += [(OF_CHOSEN, OF_REJECTED)[which]] * (length - num_shared)
        predicted_at[which].extend(
            idx if idx < num_shared else idx + start for idx in (side.scored_at - 1).tolist()
        )
    return _Strip(ids, position_ids, parts, predicted_at)


def shared_prefix(pair: TokenizedPair) -> int:
    """How many tokens the two sides' prompts have in common from the start."""
    longest = min(pair.chosen.num_prompt, pair.rejected.num_prompt)
    both = zip(pair.chosen.input_ids[:longest], pair.rejected.input_ids[:longest], strict=True)
    return next((idx for idx, (left, right) in enumerate(both) if left != right), longest)
