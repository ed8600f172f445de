"""Two sources of responses whose density ratio is known, and how well `rcpo weigh` finds it: the table in
rcpo/quality/README.md.

python tests/helpers/two_sources.py

A response is 12 words of 60, drawn independently; word w has probability proportional to exp(t_w) in the
target and to exp(-t_w) in the other source, t_w normal with deviation .25: log q_0/q_1 is a sum over words.
"""

import math
import random
from typing import NamedTuple

import numpy as np

from rcpo.quality.source import at_equal_shares, hashed_ngrams, out_of_fold, reliability
from rcpo.records.weights import DoraWeight

WORDS, LENGTH, DEVIATION = 60, 12, 0.25


class Drawn(NamedTuple):
    texts: list[str]
    is_target: list[int]
    truth: list[float]
    """q_0/(q_0 + q_1) of each response."""


class Found(NamedTuple):
    """DoRA's weights at a = a_i = 1/2 against the truth, over all responses."""

    correlation: float
    error: float
    """Mean absolute error."""
    bias: float
    """Mean of found minus true."""
    ece: float


def draw(num: int, share: float, seed: int = 0) -> Drawn:
    """`num` responses, the share of the target exactly `share`."""
    rng = random.Random(seed)
    tilts = [rng.gauss(0, DEVIATION) for _ in range(WORDS)]
    norms = [math.log(sum(math.exp(sign * tilt) for tilt in tilts)) for sign in (1, -1)]
    drawn = Drawn([], [], [])
    for number in range(num):
        is_target = number < round(num * share)
        weights = [math.exp(tilt if is_target else -tilt) for tilt in tilts]
        words = rng.choices(range(WORDS), weights, k=LENGTH)
        log_ratio = sum(2 * tilts[word] for word in words) - LENGTH * (norms[0] - norms[1])
        drawn.texts.append(" ".join(f"word{word}" for word in words))
        drawn.is_target.append(int(is_target))
        drawn.truth.append(1 / (1 + math.exp(-log_ratio)))
    return drawn


def weights_of(p: np.ndarray) -> np.ndarray:
    dora = DoraWeight(0.5, 0.5)
    return np.array([dora.of("probability", value) for value in p])


def recover(drawn: Drawn, calibration: str, gamma: float | None = None) -> Found:
    is_target = np.array(drawn.is_target)
    rows = np.arange(len(is_target))
    p = out_of_fold(hashed_ngrams(drawn.texts), is_target, rows, 5, calibration, 0)  # type: ignore[arg-type]
    if gamma is None:
        gamma = float((is_target == 0).sum() / (is_target == 1).sum())
    found, true = weights_of(at_equal_shares(p, gamma)), weights_of(np.array(drawn.truth))
    return Found(
        float(np.corrcoef(found, true)[0, 1]),
        float(np.abs(found - true).mean()),
        float((found - true).mean()),
        reliability(p, is_target).ece,
    )


def main() -> None:
    print("| target : other | responses | calibration | gamma | correlation | error | bias | ECE |")
    print("|---|---|---|---|---|---|---|---|")
    for share, name in ((0.5, "1 : 1"), (0.1, "1 : 9")):
        for num in (3000, 12000):
            drawn = draw(num, share)
            for calibration in ("platt", "isotonic"):
                found = recover(drawn, calibration)
                numbers = " | ".join(f"{value:.3f}" for value in found)
                print(f"| {name} | {num} | {calibration} | {1 / share - 1:.0f} | {numbers} |")
    found = recover(draw(12000, 0.1), "platt", 1.0)
    print("| 1 : 9 | 12000 | platt | 1, wrong | " + " | ".join(f"{value:.3f}" for value in found) + " |")


if __name__ == "__main__":
    main()
