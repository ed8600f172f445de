"""What becomes of the gold responses of held-out pairs, of which a likelihood term is
(objective.sft_of=gold).

They are on neither side, so that displacement of chosen and rejected ones says nothing of them. Called by
`rcpo.training.evaluating`; without gold responses there are no such numbers and no such pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rcpo.data.pairs import NO_SIDE, TokenizedPair
from rcpo.models.evaluation import LogProbModel, evaluate_logprobs


def gold_row(
    model: LogProbModel,
    pairs: Sequence[TokenizedPair],
    pad_id: int,
    pairs_per_device: int,
    known: Callable[[], Sequence[Mapping[str, Any]]],
) -> dict[str, float]:
    """Of held-out pairs with a gold response; nothing where there are none. Collective.

    logps/gold = mean of log pi(gold | x), summed over tokens
    displacement/gold = its change since the first of `known`, the evaluations so far; 0 where this is it
    """
    golden = [TokenizedPair(pair.gold, NO_SIDE, pair.row) for pair in pairs if pair.gold is not None]
    if not golden:
        return {}
    mean = float(evaluate_logprobs(model, golden, pad_id, pairs_per_device).z_w.double().mean())
    rows = known()
    return {"displacement/gold": mean - rows[0]["logps/gold"] if rows else 0.0, "logps/gold": mean}
