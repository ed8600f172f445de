"""The loss of the held-out pairs, as a step would have it if they were its global batch.

It is made of what an evaluation has anyway: z, and the reference's z from before the first step. Called by
`rcpo.training.loop` on rank 0.
"""

from collections.abc import Sequence

import torch

from rcpo.data.pairs import SideLogProbs, TokenizedPair
from rcpo.objectives import Objective, PairLogProbs
from rcpo.training.aggregate import Aggregate


def held_out_loss(
    objective: Objective,
    aggregate: Aggregate,
    state: tuple[float, ...],
    pairs: Sequence[TokenizedPair],
    z: SideLogProbs,
    ref: SideLogProbs | None,
) -> float | None:
    """Of all held-out pairs at once, with their weights: the mean, KL-DRO, ranks and the mean of |y_w| are
    those of the whole set, however it went through the model. Batch statistics are those of the newest
    training step, `state`.

    None without the reference's z, and for an objective that weighs tokens: an evaluation has sums alone.
    """
    if ref is None or objective.weighs_tokens:
        return None
    lengths = [[side.num_tokens - side.num_prompt for side in (pair.chosen, pair.rejected)] for pair in pairs]
    len_w, len_l = torch.tensor(lengths, dtype=z.z_w.dtype).T
    losses = objective(PairLogProbs(*z, *ref, len_w, len_l, state))
    return aggregate.of_all(torch.tensor([pair.weight for pair in pairs], dtype=losses.dtype) * losses)
