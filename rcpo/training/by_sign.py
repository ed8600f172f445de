"""Micro-batches of lists of responses: which pairs make a list, and the same laid out by sign.

Owns what a list adds to a micro-batch. How slots are laid out is in `rcpo.data.lists`, which side a response
is on in `rcpo.training.beforehand`. Called by `rcpo.training.loop`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rcpo.data.batch import PairBatch
from rcpo.data.lists import by_sign, lists_of
from rcpo.data.pairs import TokenizedPair
from rcpo.training.micro_batch import MicroBatch, spread_of


def slots_of_step(num_slots: int) -> int:
    """Pairs that a list of `num_slots` slots is in a step: with more than one all its responses may be on one
    side."""
    return 1 if num_slots == 1 else 2 * num_slots


def with_lists(
    micro_batch: MicroBatch,
    pairs: Sequence[TokenizedPair],
    num_slots: int,
    lay: Callable[[Sequence[TokenizedPair]], PairBatch],
) -> MicroBatch:
    """The micro-batch of `pairs`, on its device, with the lists that they make; `lay` lays pairs out on the
    CPU. In bf16 a response's z depends on its neighbours, so that it is another than its reference's by
    rounding already at step 0."""
    lists, device = lists_of(pairs, num_slots), micro_batch.ref_w.device

    def made(is_up: Tensor) -> MicroBatch:
        found = by_sign(pairs, lists, is_up)
        places = found.places.to(device)

        def moved(of_w: Tensor, of_l: Tensor) -> tuple[Tensor, Tensor]:
            moved_w, moved_l = torch.cat([of_w, of_l, of_w.new_zeros(1)])[places].chunk(2)
            return moved_w, moved_l

        ref_w, ref_l = moved(micro_batch.ref_w, micro_batch.ref_l)
        read_ref = None if micro_batch.read_ref is None else moved(*micro_batch.read_ref)
        weight = torch.tensor([pair.weight for pair in found.pairs]).to(device)
        spread = None if micro_batch.spread is None else spread_of(found.pairs).to(device)
        return MicroBatch(
            lay(found.pairs).to(device), ref_w, ref_l, weight, read_ref=read_ref,
            lists=found.lists.to(device), spread=spread,
        )  # fmt: skip

    return micro_batch._replace(lists=lists.to(device), by_sign=made if num_slots > 1 else None)
