"""What `rcpo.evaluation.moves` found, in numbers that are read: destinations, tokens, places, entropy."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcpo.data.describe import decoded
from rcpo.evaluation.moves import DESTINATIONS, FIRST, PARTS, SideMoves

REFUSALS = frozenset(
    ("sorry", "cannot", "unable", "apologize", "apologise", "apologies", "unfortunately", "refuse", "decline")
)
"""Words by which a refusal is known; a token that is one of them, whatever its case and the space before
it."""


def refusal_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are a word of refusal."""
    ids = range(len(tokenizer))
    return [idx for idx in ids if str(tokenizer.decode([idx])).strip().lower() in REFUSALS]


def summarise(moved: SideMoves, tokenizer: PreTrainedTokenizerBase, num_top: int) -> dict[str, Any]:
    """Of one side. nats: mean change of a response's log-probability. Destinations are of the positions whose
    own token lost probability; `share` of what was lost there (they add up to 1), `per_nat` of each nat that
    these positions lost. Tokens: change of probability summed over a response, on average."""
    num = len(moved.pair.unique())
    fell = moved.lost > 0
    mass, nats = float(moved.lost[fell].sum()), -float(moved.nats[fell].sum())
    to = moved.to[fell].sum(0).tolist()
    before, after = moved.entropy.mean(0).tolist()
    return {
        "responses": num,
        "positions": len(moved.nats),
        "nats": float(moved.nats.sum()) / num,
        "positions_that_lost": int(fell.sum()),
        "lost": mass / num,
        "to": {
            name: {"share": _ratio(value, mass), "per_nat": _ratio(value, nats)}
            for name, value in zip(DESTINATIONS, to, strict=True)
        },
        "entropy": {"before": before, "after": after},
        "places": _places(moved, num),
        "gained": top_tokens(moved.change / num, tokenizer, num_top),
        "lost_most": top_tokens(-moved.change / num, tokenizer, num_top),
        "first_gained": top_tokens(moved.first_change / num, tokenizer, num_top),
        "first_lost_most": top_tokens(-moved.first_change / num, tokenizer, num_top),
    }


def _places(moved: SideMoves, num: int) -> dict[str, dict[str, float | None]]:
    """Nats a response and the share of all nats: of the first positions, which overlap the rest; and of
    `PARTS`, whose shares add up to 1."""
    selected = {f"first_{FIRST}": moved.position < FIRST}
    selected |= {name: moved.part == place for place, name in enumerate(PARTS)}
    total = float(moved.nats.sum())
    found = {}
    for name, where in selected.items():
        nats = float(moved.nats[where].sum())
        found[name] = {"nats": nats / num, "share": _ratio(nats, total)}
    return found


def _ratio(value: float, whole: float) -> float | None:
    return value / whole if whole else None


def top_tokens(change: Tensor, tokenizer: PreTrainedTokenizerBase, num: int) -> list[dict[str, Any]]:
    """The largest, largest first; only those above 0."""
    values, ids = torch.topk(change, min(num, len(change)))
    return [
        {"token": decoded([idx], tokenizer), "id": idx, "change": value}
        for value, idx in zip(values.tolist(), ids.tolist(), strict=True)
        if value > 0
    ]
