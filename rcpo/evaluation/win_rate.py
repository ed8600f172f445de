"""From verdicts to win rates: plain and length-controlled, with intervals over prompts, and what the order of
the answers did. In numpy alone.

The length-controlled rate is a logistic regression of A's wins on tanh(length difference / its deviation), as
AlpacaEval 2 has it for one model, without its terms for models and prompts; at no difference in length.
Lengths are in characters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rcpo.evaluation.judge import FIRST, SECOND, TIE

RESAMPLES = 1000
RIDGE = 1e-2
"""On the slope and, 100 times smaller, on the intercept, in units of one prompt: keeps both finite where all
wins go to one side."""
NEWTON_STEPS = 25
Verdicts = tuple[str | None, str | None]
"""A's answer first, then B's."""
_A_FIRST = {FIRST: 1.0, SECOND: 0.0, TIE: 0.5}


@dataclass(frozen=True)
class Rate:
    """Of A's wins; a tie is half of one."""

    value: float
    low: float
    high: float
    """95 % by bootstrap over prompts."""


@dataclass(frozen=True)
class Order:
    """What the place of an answer did, over all replies that can be read."""

    first: float
    """Share of verdicts for the answer that was shown first."""
    second: float
    tie: float
    consistent: float
    """Share of the prompts, of those read in both orders, whose winner is the same in both."""
    unreadable: int
    """Replies."""


def wins_of(verdicts: Sequence[Verdicts]) -> np.ndarray:
    """A's share of each prompt's win, (n,): mean over the orders that can be read; nan where none can."""
    found = []
    for in_order, swapped in verdicts:
        values = [] if in_order is None else [_A_FIRST[in_order]]
        values += [] if swapped is None else [1.0 - _A_FIRST[swapped]]
        found.append(float(np.mean(values)) if values else np.nan)
    return np.array(found)


def order_of(verdicts: Sequence[Verdicts]) -> Order:
    """Of verdicts of which one at least can be read."""
    read = [each for both in verdicts for each in both if each is not None]
    whole = [(one, other) for one, other in verdicts if one is not None and other is not None]
    same = [_A_FIRST[one] == 1.0 - _A_FIRST[other] for one, other in whole]
    first, second, tie = (sum(each == kind for each in read) / len(read) for kind in (FIRST, SECOND, TIE))
    consistent = sum(same) / len(same) if same else float("nan")
    return Order(first, second, tie, consistent, 2 * len(verdicts) - len(read))


def rates(wins: np.ndarray, longer: np.ndarray, seed: int = 0) -> tuple[Rate, Rate]:
    """(plain, length-controlled) of prompts that have a verdict, (n,) each; `longer`: characters that A's
    answer has more than B's."""
    known = ~np.isnan(wins)
    wins, difference = wins[known], _controlled(longer[known])
    draws = np.random.default_rng(seed).integers(len(wins), size=(RESAMPLES, len(wins)))
    plain = Rate(float(wins.mean()), *_interval(wins[draws].mean(1)))
    at_equal_length = equal_length_rates(wins[None], difference[None])[0]
    drawn = equal_length_rates(wins[draws], difference[draws])
    return plain, Rate(float(at_equal_length), *_interval(drawn))


def _controlled(longer: np.ndarray) -> np.ndarray:
    spread = longer.std()
    return np.tanh(longer / spread) if spread > 0 else np.zeros(len(longer))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def equal_length_rates(wins: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """(S,) sigmoid of the intercept of S logistic regressions of wins (S, n) in [0, 1] on the difference
    (S, n), by Newton's steps."""
    weights = np.zeros((len(wins), 2))
    inputs = np.stack([np.ones_like(difference), difference], -1)
    ridge = np.array([RIDGE / 100, RIDGE])
    for _ in range(NEWTON_STEPS):
        logits = np.einsum("snk,sk->sn", inputs, weights)
        chance = 1 / (1 + np.exp(-logits))
        slope = np.einsum("snk,sn->sk", inputs, wins - chance) - ridge * weights
        bend = np.einsum("snk,sn,snj->skj", inputs, chance * (1 - chance), inputs) + np.diag(ridge)
        step = np.linalg.solve(bend, slope[..., None])[..., 0]
        weights = weights + np.clip(step, -2.0, 2.0)
    return np.asarray(1 / (1 + np.exp(-weights[:, 0])))
