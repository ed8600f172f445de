"""CHES, the score of a pair that predicts likelihood displacement, and log-probs from the same forward pass.

Razin et al., arXiv 2410.08847. h is the last hidden state, after the final norm, at the positions that
predict a response's tokens: last prompt token .. last but one response token, |y| of them; h_w and h_l are
its sums over a side. Only those positions are picked, so neither padding nor batching changes a score, which
the published code's do. Called by `rcpo.commands.score`.

Shape legend: B pairs, N response tokens of a batch, H hidden.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcpo.common.errors import NonFiniteError, UserError
from rcpo.data.batch import collate, width
from rcpo.data.tokenize import TokenizedPair
from rcpo.models.policy import Policy


class ModelScores(NamedTuple):
    """What the model says of one pair."""

    ches: float
    ches_norm: float
    z_w: float
    z_l: float


def ches(h_w: Tensor, h_l: Tensor) -> Tensor:
    """<h_w, h_l> - |h_w|^2 per pair (B,), from sums of hidden states (B, H). Definition 2 of the paper."""
    return (h_w * h_l).sum(-1) - h_w.square().sum(-1)


def ches_norm(h_w: Tensor, h_l: Tensor, len_w: Tensor, len_l: Tensor) -> Tensor:
    """<h_w, h_l>/(|y_w| |y_l|) - |h_w|^2/|y_w|^2 per pair (B,): CHES of the means of hidden states."""
    return ches(h_w / len_w[:, None], h_l / len_l[:, None])


@torch.no_grad()
def score_pairs(
    policy: Policy,
    pairs: Sequence[TokenizedPair],
    pad_id: int,
    pairs_per_batch: int,
    on_batch: Callable[[int], None] = lambda num_pairs: None,
) -> list[ModelScores]:
    """CHES and summed log-probs of each pair under `policy`, in the order of `pairs`. Raises NonFiniteError
    with the row of a pair whose scores are not finite, and UserError for single answers."""
    single = next((pair.row for pair in pairs if len(pair.sides) < 2), None)
    if single is not None:
        raise UserError(
            f"data: row {single} is a single answer with a label, and the scores are of pairs; give pairs: "
            "prompt, chosen, rejected"
        )
    policy.eval()
    by_length = sorted(range(len(pairs)), key=lambda idx: width(pairs[idx]))
    found: dict[int, ModelScores] = {}
    for start in range(0, len(pairs), pairs_per_batch):
        members = by_length[start : start + pairs_per_batch]
        columns = _score_batch(policy, [pairs[idx] for idx in members], pad_id)
        for idx, values in zip(members, columns.T.tolist(), strict=True):
            if not all(map(math.isfinite, values)):
                raise NonFiniteError(
                    f"data row {pairs[idx].row}: its scores are not finite ({values[0]}, {values[2]}); type "
                    "model.dtype=float32, or mend the model"
                )
            found[idx] = ModelScores(*values)
        on_batch(len(members))
    return [found[idx] for idx in range(len(pairs))]


def _score_batch(policy: Policy, pairs: Sequence[TokenizedPair], pad_id: int) -> Tensor:
    """(4, B) fp64 on the CPU: the fields of `ModelScores`."""
    batch = collate(pairs, pad_id).to(policy.head.weight.device)
    hidden = policy.body(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    picked = hidden.flatten(0, 1).index_select(0, batch.token_positions)
    # In fp64, because CHES is the small difference of two large products.
    z, sums = (
        torch.stack([side.sum(0) for side in values.double().cpu().split(batch.lengths.tolist())])
        for values in (policy.head(hidden, batch), picked)
    )
    num_pairs, lengths = batch.num_pairs, batch.lengths.double().cpu()
    h_w, h_l = sums[:num_pairs], sums[num_pairs:]
    normed = ches_norm(h_w, h_l, lengths[:num_pairs], lengths[num_pairs:])
    return torch.stack([ches(h_w, h_l), normed, z[:num_pairs], z[num_pairs:]])
