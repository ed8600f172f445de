"""Where the probability of a response's tokens went: the initial model against the trained one, position by
position.

At position t of a response, p0 and p1 are the two models' distributions over the vocabulary, given the same
tokens before. What the response's own token lost, p0(y_t) - p1(y_t), is exactly what all others gained
together: here that sum is divided by who they are. Logits exist in chunks of positions alone. Does not read
runs (`rcpo.commands.lab`) or say anything (`rcpo.evaluation.moves_summary`).

Shape legend: n positions of a chunk, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rcpo.common.errors import UserError
from rcpo.data.batch import collate
from rcpo.data.pairs import TokenizedPair, present_in_pairs
from rcpo.data.template import num_common
from rcpo.models.evaluation import batches_by_length
from rcpo.models.logprobs import head_sizes
from rcpo.models.policy import Policy

DESTINATIONS = ("opposite", "refusal", "end", "others")
"""The other response's token at that position; words of refusal; what ends a response; all else. A token
counts for the first that fits."""
PARTS = ("prefix", "content", "end")
"""Of a response: what both responses begin with, the token that ends it, and what is between."""
FIRST = 10
NOBODY = -1
"""Where the other response has no token."""


class Moves(NamedTuple):
    """Of n positions; fp64."""

    nats: Tensor
    """(n,) log p1(y) - log p0(y)."""
    lost: Tensor
    """(n,) p0(y) - p1(y); below 0 where the token gained."""
    own: Tensor
    """(n, 2) p0(y) and p1(y)."""
    to: Tensor
    """(n, 4) what `DESTINATIONS` gained together; a row adds up to `lost`."""
    entropy: Tensor
    """(n, 2) of p0 and p1, in nats."""
    change: Tensor
    """(V,) p1 - p0 summed over the positions."""


def moves(
    before: Tensor, after: Tensor, own: Tensor, opposite: Tensor, refusal: Sequence[int], ends: Sequence[int]
) -> Moves:
    """From logits (n, V) of both models, the response's own tokens (n,), the other response's (n,), `NOBODY`
    where it has none, and ids of refusal words and of what ends a response."""
    logp = [logits.double().log_softmax(-1) for logits in (before, after)]
    p0, p1 = (each.exp() for each in logp)
    entropy = torch.stack(
        [-(p * logs.clamp_min(-1e4)).sum(-1) for p, logs in zip((p0, p1), logp, strict=True)], 1
    )
    change = p1 - p0
    total = change.sum(0)
    mine = own[:, None]
    nats = (logp[1].gather(1, mine) - logp[0].gather(1, mine)).squeeze(1)
    both = torch.cat([p0.gather(1, mine), p1.gather(1, mine)], 1)
    lost = both[:, 0] - both[:, 1]
    others = change.scatter(1, mine, 0.0)
    is_there = (opposite != NOBODY) & (opposite != own)
    place = opposite.clamp_min(0)[:, None]
    to_opposite = others.gather(1, place).squeeze(1) * is_there
    others = torch.where(is_there[:, None], others.scatter(1, place, 0.0), others)
    to = [to_opposite]
    for ids in (refusal, ends):
        columns = torch.tensor(sorted(set(ids)), dtype=torch.long, device=others.device)
        to.append(others[:, columns].sum(1))
        others[:, columns] = 0.0
    return Moves(nats, lost, both, torch.stack([*to, others.sum(1)], 1), entropy, total)


class SideMoves(NamedTuple):
    """Positions of one side's responses, N of them."""

    pair: Tensor
    """(N,) place of its pair."""
    position: Tensor
    """(N,) from 0 at the response's first token."""
    part: Tensor
    """(N,) index into `PARTS`."""
    nats: Tensor
    lost: Tensor
    own: Tensor
    to: Tensor
    entropy: Tensor
    change: Tensor
    """(V,) over all positions."""
    first_change: Tensor
    """(V,) over the responses' first positions."""


@torch.inference_mode()
def follow(
    before: Policy,
    after: Policy,
    pairs: Sequence[TokenizedPair],
    pad_id: int,
    pairs_per_batch: int,
    refusal: Sequence[int],
    ends: Sequence[int],
) -> tuple[SideMoves, SideMoves]:
    """The chosen and the rejected responses of `pairs`, one forward pass of each model. Positions are in
    order of their batches. Raises UserError where one side has none."""
    if not bool(present_in_pairs(pairs).any(dim=1).all()):
        raise UserError(
            "the held-out rows are answers of one label alone (conversations, say), and what they lose is "
            "looked for in the other response too; give a run whose held-out rows (data.eval_path) are pairs"
        )
    found: tuple[list[SideMoves], list[SideMoves]] = ([], [])
    for members in batches_by_length(pairs, pairs_per_batch):
        batch = collate([pairs[idx] for idx in members], pad_id).to(after.head.weight.device)
        hidden = [
            policy.body(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
            for policy in (before, after)
        ]
        picked = [states.index_select(0, batch.token_positions) for states in hidden]
        start = 0
        for side in range(2):
            for idx in members:
                own, opposite = _responses(pairs[idx], side)
                if not own:  # a single answer has one side
                    continue
                stop = start + len(own)
                found[side].append(
                    _rows(
                        before,
                        after,
                        [each[start:stop] for each in picked],
                        idx,
                        own,
                        opposite,
                        refusal,
                        ends,
                    )
                )
                start = stop
    return _joined(found[0]), _joined(found[1])


def _responses(pair: TokenizedPair, side: int) -> tuple[list[int], list[int]]:
    """The response of a side and the other one."""
    both = [np.asarray(each.ids)[each.scored_at].tolist() for each in (pair.chosen, pair.rejected)]
    return both[side], both[1 - side]


def _rows(
    before: Policy, after: Policy, hidden: Sequence[Tensor], idx: int, own: list[int], opposite: list[int],
    refusal: Sequence[int], ends: Sequence[int],
) -> SideMoves:  # fmt: skip
    """One response, in chunks of its positions."""
    device, num = hidden[0].device, len(own)
    size = head_sizes(device.type, before.head.weight.shape[0]).chunk_tokens
    targets = torch.tensor(own, device=device)
    others = torch.tensor((opposite + [NOBODY] * num)[:num], device=device)
    chunks: list[Moves] = []
    for start in (0, *range(0, num, size)):  # the first position alone comes first
        rows = slice(start, start + size if chunks else 1)
        logits = [
            policy.head.logits(states[rows]) for policy, states in zip((before, after), hidden, strict=True)
        ]
        chunks.append(moves(logits[0], logits[1], targets[rows], others[rows], refusal, ends))
    first, *chunks = chunks
    position = torch.arange(num)
    part = torch.where(position < num_common(own, opposite), 0, 1)
    if own[-1] in ends:
        part[-1] = 2
    return SideMoves(
        pair=torch.full((num,), idx),
        position=position,
        part=part,
        nats=torch.cat([chunk.nats for chunk in chunks]).cpu(),
        lost=torch.cat([chunk.lost for chunk in chunks]).cpu(),
        own=torch.cat([chunk.own for chunk in chunks]).cpu(),
        to=torch.cat([chunk.to for chunk in chunks]).cpu(),
        entropy=torch.cat([chunk.entropy for chunk in chunks]).cpu(),
        change=torch.stack([chunk.change for chunk in chunks]).sum(0).cpu(),
        first_change=first.change.cpu(),
    )


def _joined(rows: Sequence[SideMoves]) -> SideMoves:
    totals = ("change", "first_change")
    joined = {
        name: torch.stack(parts).sum(0) if name in totals else torch.cat(parts)
        for name, parts in zip(SideMoves._fields, map(list, zip(*rows, strict=True)), strict=True)
    }
    return SideMoves(**joined)
