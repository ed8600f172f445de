"""The loss of the held-out pairs, as a step would have it if they were its global batch.

It is made of what an evaluation has anyway: z, and the reference's z from before the first step. Called by
`rcpo.training.loop` on rank 0.
"""

from collections.abc import Sequence

import torch

from rcpo.data.lists import lists_of
from rcpo.data.pairs import SideLogProbs, TokenizedPair, present_in_pairs
from rcpo.objectives import Objective, PairLogProbs
from rcpo.objectives.loss import sides_there
from rcpo.objectives.trial import takes_single_answers
from rcpo.training.aggregate import Aggregate


def held_out_loss(
    objective: Objective,
    aggregate: Aggregate,
    state: tuple[float, ...],
    pairs: Sequence[TokenizedPair],
    z: SideLogProbs,
    ref: SideLogProbs | None,
    num_slots: int = 1,
) -> float | None:
    """Of all held-out pairs at once, with their weights: the mean, KL-DRO, ranks and the mean of |y_w| are
    those of the whole set, however it went through the model. Batch statistics are those of the newest
    training step, `state`. Lists of responses are on `num_slots` pairs each.

    None without the reference's z, for an objective that reads more than sums of log-probs, which is what an
    evaluation has, and of single answers for one that compares the two responses of a pair.
    """
    if ref is None or objective.reads_tokens:
        return None
    are_whole = bool(present_in_pairs(pairs).all())
    is_listed = objective.listwise and pairs[0].scores is not None
    if not (are_whole or is_listed or takes_single_answers(objective)):
        return None
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    lengths = torch.tensor([side.num_scored for side in sides], dtype=z.z_w.dtype)
    len_w, len_l, present = sides_there(lengths, are_whole)
    mean_tokens = None if are_whole else float(lengths[: len(pairs)].mean())
    values = PairLogProbs(
        *z, *ref, len_w, len_l, state, mean_tokens=mean_tokens, present=present,
        lists=lists_of(pairs, num_slots) if is_listed else None,
    )  # fmt: skip
    losses = objective(values)
    return aggregate.of_all(torch.tensor([pair.weight for pair in pairs], dtype=losses.dtype) * losses)
