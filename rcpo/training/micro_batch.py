"""What a step is given of a micro-batch: pairs, the reference's log-probs, and what else an objective reads.

Owns how that is put together from pairs and the reference's rows. Made by `rcpo.training.loop`, used by
`rcpo.training.step`; `rcpo.training.beforehand` adds what the global batch decides.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcpo.data.batch import PairBatch, collate_sides, prompt_as_response, tail_weights
from rcpo.data.pairs import NO_SIDE, TokenizedPair
from rcpo.models.logprobs import sum_per_side
from rcpo.objectives import Objective
from rcpo.objectives.loss import Lists
from rcpo.ranks.transfer import to_device
from rcpo.reference.table import ReferenceRows
from rcpo.training.aggregate import Tilt


class MicroBatch(NamedTuple):
    """Pairs on the device with their reference log-probs and weights (B,) fp32."""

    batch: PairBatch
    ref_w: Tensor
    ref_l: Tensor
    weight: Tensor
    """What multiplies a pair's loss; 1 where a run has no sample weights."""
    tilt: Tilt | None = None
    """What the aggregate makes of the losses; None: their mean."""
    mean_tokens: float | None = None
    """Mean |y_w| of the global batch, where the objective asks for it."""
    partners: tuple[Tensor, Tensor] | None = None
    """What the sides are compared with in the global batch, where the objective compares ranks."""
    read_ref: tuple[Tensor, Tensor] | None = None
    """The reference's numbers that the objective reads, where they are others than those that displacement is
    measured against."""
    likely: PairBatch | None = None
    """One side alone: a text for each pair that a likelihood term is of, beside the chosen response."""
    spread: Tensor | None = None
    """(B, K) of the responses of a pair, or of its list, their weights over `weight`, nan behind them; None
    where one weight is all that counts."""
    lists: Lists | None = None
    """Which pairs make a list of responses; None: each is a pair."""
    by_sign: "Callable[[Tensor], MicroBatch] | None" = None
    """Of lists of more than two: the same with the responses of which (2B,) is True as its chosen side."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on the device; before the step has added to it."""
        ref_w, ref_l, weight = (to_device(each, device) for each in (self.ref_w, self.ref_l, self.weight))
        read_ref = None
        if self.read_ref is not None:
            read_w, read_l = (to_device(each, device) for each in self.read_ref)
            read_ref = (read_w, read_l)
        likely = None if self.likely is None else self.likely.to(device)
        return self._replace(
            batch=self.batch.to(device), ref_w=ref_w, ref_l=ref_l, weight=weight, read_ref=read_ref,
            likely=likely, spread=None if self.spread is None else to_device(self.spread, device),
        )  # fmt: skip


def made_for(
    objective: Objective,
    pairs: Sequence[TokenizedPair],
    batch: PairBatch,
    rows: ReferenceRows,
    pad_id: int,
    read: ReferenceRows | None = None,
) -> MicroBatch:
    """A micro-batch of `pairs`, laid out as `batch`, with what this objective reads of its tokens and of the
    reference's: of `read`, where that is another one than displacement is measured against, `rows`. As yet
    on the CPU, but for what a live reference gives."""
    ref_w, ref_l, ref_token_logps = rows
    if objective.wpo:
        batch = batch._replace(gives_log_weights=True)
    read_ref = None
    if read is not None:
        read_ref, ref_token_logps = (read.ref_w, read.ref_l), read.ref_token_logps
    if objective.weighs_tokens:
        batch = batch._replace(ref_token_logps=ref_token_logps)
    elif objective.ld_alpha != 1:
        weights = tail_weights(batch.lengths, objective.ld_alpha)
        batch = batch._replace(token_weights=weights)
        read_w, read_l = torch.zeros_like(ref_w), torch.zeros_like(ref_l)
        if ref_token_logps is not None:
            weighted = to_device(weights, ref_token_logps.device) * ref_token_logps
            read_w, read_l = sum_per_side(weighted, batch).chunk(2)
        read_ref = (read_w, read_l)
    likely = beside(objective, pairs, pad_id)
    weight = torch.tensor([pair.weight for pair in pairs])
    spread = None if objective.spread_lambda is None else spread_of(pairs)
    return MicroBatch(batch, ref_w, ref_l, weight, read_ref=read_ref, likely=likely, spread=spread)


def spread_of(pairs: Sequence[TokenizedPair]) -> Tensor:
    """`MicroBatch.spread` of these pairs, on the CPU; 1 where a pair has one weight."""
    rows = [torch.tensor(pair.spread or (1.0,)) for pair in pairs]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=math.nan)


def beside(objective: Objective, pairs: Sequence[TokenizedPair], pad_id: int) -> PairBatch | None:
    """The texts beside the responses that this objective's likelihood term is of, as one side; None where it
    is of the chosen response as the loss reads it."""
    if objective.reading.sft_of == "text":
        return collate_sides([prompt_as_response(pair.chosen) for pair in pairs], pad_id)
    if objective.reading.sft_of == "plain":
        return collate_sides([pair.chosen for pair in pairs], pad_id)
    if objective.reading.sft_of == "gold":
        return collate_sides([pair.gold or NO_SIDE for pair in pairs], pad_id)
    return None
