"""calibration=published: the recursion of the code that was published with arXiv 2604.18239.

    log r = log(mean d_w / mean d_l)     log r* = log(|s_l| / |s_w|)       of one micro-batch of one rank
    EMA <- beta EMA + (1 - beta) value, of both; the first value is the first EMA
    alpha = exp(1/2 (EMA[log r*] - EMA[log r])), this micro-batch in it

So it forgets by micro-batches: beta .98 is .851 a step at 8 micro-batches a rank, and .524 at 32. How a batch
is split over micro-batches and ranks changes the training, as it does there. README.md of this room lists
what rcpo's own calibration does otherwise, and what this one still does not take from the published code.

Owns the recursion. Does not own where a micro-batch's scores come from: `rcpo.training.each_micro_batch`.
Built by `rcpo.method.calibrators`.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from rcpo.method.band import disentanglement_band
from rcpo.method.incentives import Incentives
from rcpo.method.per_step import Quiet
from rcpo.method.scores import ScoreGeometry
from rcpo.method.statistics import StepStatistics
from rcpo.ranks.distributed import gather, rank


@dataclass(frozen=True)
class Averages:
    """What a rank carries from micro-batch to micro-batch."""

    position: float = 0.0
    """EMA of log r."""
    center: float = 0.0
    """EMA of log r*."""
    num_updates: int = 0
    """Micro-batches in it."""
    num_skipped: int = 0
    """Micro-batches that left it untouched: an incentive mean or a score not positive and finite."""
    num_clamped: int = 0
    """Micro-batches whose alpha was limited."""


@dataclass
class PublishedCalibration(Quiet):
    """alpha of every micro-batch of every rank, from the micro-batches so far, itself among them.

    Two waits for the device a micro-batch. A step whose numbers are not finite leaves no trace.
    """

    ema_beta: float
    """Per micro-batch."""
    max_log_alpha: float
    kept: Averages = field(default_factory=Averages)
    """After the newest whole step."""
    now: Averages = field(default_factory=Averages)
    """In the step under way."""
    alphas: list[float] = field(default_factory=list)
    """Of the step under way."""

    per_micro_batch = True

    def begin(self) -> None:
        self.now, self.alphas = self.kept, []

    def alpha_of(self, incentives: Incentives, geometry: ScoreGeometry | None) -> float:
        d_w, d_l = torch.stack([side.double().mean() for side in incentives]).tolist()
        log_ratio = StepStatistics(d_w, d_l, geometry).log_ratio
        band = None
        if log_ratio is not None and geometry is not None:
            band = disentanglement_band(log_ratio, 1.0, geometry)
        now = self.now
        if band is None:
            now = replace(now, num_skipped=now.num_skipped + 1)
        else:
            beta = self.ema_beta if now.num_updates else 0.0
            now = replace(
                now,
                position=beta * now.position + (1 - beta) * band.position,
                center=beta * now.center + (1 - beta) * band.center,
                num_updates=now.num_updates + 1,
            )
        is_clamped = abs(0.5 * (now.center - now.position)) > self.max_log_alpha
        self.now = replace(now, num_clamped=now.num_clamped + is_clamped)
        self.alphas.append(self._alpha(self.now))
        return self.alphas[-1]

    def _alpha(self, averages: Averages) -> float:
        log_alpha = 0.5 * (averages.center - averages.position)
        return math.exp(max(-self.max_log_alpha, min(self.max_log_alpha, log_alpha)))

    def alpha(self) -> float:
        return self._alpha(self.now)

    def update(self, statistics: StepStatistics) -> None:
        self.kept = self.now

    def of_rank(self, num_ranks: int) -> dict[str, float]:
        now = self.now
        return {
            "calibration/alpha": sum(self.alphas) / max(1, len(self.alphas)) / num_ranks,
            "calibration/position_ema": now.position / num_ranks,
            "calibration/center_ema": now.center / num_ranks,
            "calibration/skipped": float(now.num_skipped),
            "calibration/clamped": float(now.num_clamped),
        }

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks. Collective."""
        return {"ranks": gather(asdict(self.kept))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """This rank's; where there were others before, each goes on from the mean of theirs. Collective."""
        of_ranks = [Averages(**each) for each in state["ranks"]]
        self.kept = of_ranks[rank()] if len(gather(None)) == len(of_ranks) else _joined(of_ranks)
        self.now = self.kept


def _joined(of_ranks: list[Averages]) -> Averages:
    """The mean of averages; what was counted is counted once, on rank 0."""
    counts = rank() == 0
    return Averages(
        position=sum(each.position for each in of_ranks) / len(of_ranks),
        center=sum(each.center for each in of_ranks) / len(of_ranks),
        num_updates=max(each.num_updates for each in of_ranks),
        num_skipped=counts * sum(each.num_skipped for each in of_ranks),
        num_clamped=counts * sum(each.num_clamped for each in of_ranks),
    )
