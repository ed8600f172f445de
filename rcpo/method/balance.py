"""calibration=balance: alpha that keeps the middle of both sides where it was, with a plant that it learns.

Owns the law and the filters behind it. Does not measure (`rcpo.training.loop` does, on held-out probe pairs).
Built by `rcpo.method.calibrators`; rcpo's own, not of the paper.

The aim. c = (r_w + r_l) / 2 is the common mode of displacement. The chosen response rises and the rejected
one falls if and only if |c| < margin / 2, so c = 0 is the middle of what is wanted, on whichever side an
objective errs: dpo pulls both responses down, simpo pulls both up.

The plant. With u = log alpha, one optimizer step moves c by k (m - u*), in nats: k is the strength of
alpha (nats per step and unit of u), u* the alpha that would hold c, and m what the optimizer has made of u,
m(t) = b m(t-1) + (1 - b) u(t) with its momentum b, bias-corrected as Adam's is. k and u* are not known. k is
proportional to the learning rate, and u* wanders as the model learns:

    c(t+1) = c(t) + s(t) k (m(t) + d(t) + noise(eta))       d = -u*
    d(t+1) = d(t) + noise(walk)                             d(0) ~ N(0, drift^2)

s is the step's share of the peak learning rate (warm-up, decay). All of it is in units of k, so nothing here
depends on the size of nats: not on the learning rate, the model or the objective.

The filters. For known (k, eta, drift) this is a Kalman filter of two states (c/k, d), and u is a known
input, so that nothing lags. The three are found by Bayes' rule: one filter per point of a grid, weighted by
how well it foretold the measurements, log weight = -1/2 (e^2 / S + log S) - log k with e = c_measured / k - c
/ k and S its variance. Measurements on the same probe pairs compare every pair with itself, so their own
noise is small (PROBE_NATS); the batches' noise is in eta.

The law. With the posterior's means of c/k and d, weighted by sqrt(k), both poles of the loop (c, m) are put
at p = POLE. Unweighted means make the smallest error in u, and overdo it where k is larger than thought;
weighted by k^2 they make the smallest in nats, and are timid: a loop that moves alpha little learns k slowly,
and an objective that lifts both sides at once (cpo on real weights) is far away by then.

    u = u* - a c/k - g (m - u*)        a = (1 - p)^2 / (1 - b)        g = (b - p^2) / (1 - b)

because c' = c + k (m' - u*), m' - u* = b (m - u*) + (1 - b)(u - u*) has trace 1 - (1-b) a + b - (1-b) g = 2p
and determinant b - (1-b) g = p^2. log alpha is limited to +-limit and moves by SLEW a step at most.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcpo.method.per_step import PerStep
from rcpo.method.statistics import StepStatistics

Grid = NDArray[np.float64]

POLE = 0.8
"""Both poles of the closed loop, per step: an error is down to a tenth after some 17 steps."""
WALK = 0.015
"""Standard deviation of u*'s change per step, at most: it was seen to move by .15 in 100 steps (simpo), and
in 35 with 32 pairs a step, where the law is late. A tenth of the drift where that is less."""
SLEW = 0.2
"""The most that log alpha moves in one step."""
EARLY_STEPS = 30
"""So many steps are measured more often: alpha may have to go far before the filters know their plant, and
both sides may move by a nat in the first five."""
EARLY_EVERY = 2
"""Steps from one of these measurements to the next."""
PROBE_NATS = 0.003
"""Standard deviation of a measurement beside what the steps themselves do: rounding."""
FORGET = 0.98
"""Decay of the log weights per measurement: k changes while the model learns."""
STRENGTHS = np.array([10.0 ** (exponent / 4) for exponent in range(-16, 13)])[:, None, None]
"""The grid of k, in nats per step: 1e-4 to 1e3."""
NOISES = np.array([0.03, 0.1, 0.3])[None, :, None]
"""The grid of eta: a step's noise as a part of k."""
DRIFTS = np.array([0.02, 0.1, 0.4, 1.2])[None, None, :]
"""How large |u*| may be: seen were .02 (dpo on real weights), .15 (simpo), .35 (the embedded model) and about
1 (cpo on real weights)."""
WALKS = np.minimum(WALK, DRIFTS / 10)


def _filled(value: Grid | float) -> Grid:
    shape = np.broadcast_shapes(STRENGTHS.shape, NOISES.shape, DRIFTS.shape)
    return np.broadcast_to(value, shape).astype(np.float64)


@dataclass
class Filters:
    """One Kalman filter for every (k, eta, drift) of the grid; states and variances are in units of k."""

    c: Grid = field(default_factory=lambda: _filled(0.0))
    d: Grid = field(default_factory=lambda: _filled(0.0))
    var_c: Grid = field(default_factory=lambda: _filled(0.0))
    cov: Grid = field(default_factory=lambda: _filled(0.0))
    var_d: Grid = field(default_factory=lambda: _filled(DRIFTS**2))
    log_weight: Grid = field(default_factory=lambda: _filled(0.0))

    def measure(self, nats: float) -> None:
        """Take in c, measured."""
        error = nats / STRENGTHS - self.c
        variance = self.var_c + (PROBE_NATS / STRENGTHS) ** 2
        likelihood = -0.5 * (error**2 / variance + np.log(variance)) - np.log(STRENGTHS)
        self.log_weight = FORGET * self.log_weight + likelihood
        self.log_weight -= self.log_weight.max()
        gain_c, gain_d = self.var_c / variance, self.cov / variance
        self.c += gain_c * error
        self.d += gain_d * error
        self.var_d -= gain_d * self.cov
        self.cov *= 1 - gain_c
        self.var_c *= 1 - gain_c

    def advance(self, m: float, share: float) -> None:
        """One optimizer step at this share of the peak learning rate, whose momentum makes `m` of log
        alpha."""
        self.c += share * (m + self.d)
        self.var_c += 2 * share * self.cov + share**2 * (self.var_d + NOISES**2)
        self.cov += share * self.var_d
        self.var_d += WALKS**2

    def means(self) -> tuple[float, float, float]:
        """c/k and d, weighted by sqrt(k), and the mean of log k."""
        weight = np.exp(self.log_weight)
        tilted = weight * np.sqrt(STRENGTHS)
        total = tilted.sum()
        log_k = float((weight * np.log(STRENGTHS)).sum() / weight.sum())
        return float((tilted * self.c).sum() / total), float((tilted * self.d).sum() / total), log_k

    def state(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).ravel().tolist() for name in self.__dataclass_fields__}

    def load_state(self, state: dict[str, list[float]]) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, np.array(state[name]).reshape(self.c.shape))


@dataclass
class BalanceCalibration(PerStep):
    """Steers c = (r_w + r_l) / 2 of held-out probe pairs to 0; two-sided, and nothing to tune. The module
    says how.

    Measured before steps 1, 2, 4, 6, ... 28 (from 0; at 0 c is 0), and from 30 on before every `every`-th
    optimizer step; the measurement of step t moves alpha from step t+1 on. Needs no score geometry.
    """

    limit: float
    every: int
    momentum: float
    """b: AdamW's first decay rate, or SGD's momentum."""
    filters: Filters = field(default_factory=Filters)
    step: int = 0
    """Optimizer steps seen."""
    log_alpha: float = 0.0
    m: float = 0.0
    """What the optimizer's momentum has made of log alpha so far."""
    num_skipped: int = 0
    """Measurements that were not finite."""
    num_clamped: int = 0
    """Steps whose log alpha `limit` cut short."""
    last: float = math.nan
    """The newest measurement used."""

    def probes_at(self, step: int) -> bool:
        every = min(self.every, EARLY_EVERY) if step < EARLY_STEPS else self.every
        return step == 1 or (step > 0 and step % every == 0)

    def alpha(self) -> float:
        return math.exp(self.log_alpha)

    def update(self, statistics: StepStatistics) -> None:
        if statistics.probe is not None:
            self._measure((statistics.probe.r_w + statistics.probe.r_l) / 2)
        new = self._new_part(self.step)
        self.m += new * (self.log_alpha - self.m)
        self.filters.advance(self.m, statistics.lr_share)
        self.step += 1
        self._decide()

    def _measure(self, nats: float) -> None:
        if not math.isfinite(nats):
            self.num_skipped += 1
            return
        self.last = nats
        self.filters.measure(nats)

    def _new_part(self, step: int) -> float:
        """1 - b of a step: bias correction makes the first steps' momentum a plain mean."""
        return (1 - self.momentum) / (1 - self.momentum ** (step + 1))

    def _decide(self) -> None:
        c, d, _ = self.filters.means()
        new = self._new_part(self.step)
        u_star = -d
        wanted = u_star - (1 - POLE) ** 2 / new * c - (1 - new - POLE**2) / new * (self.m - u_star)
        limited = max(-self.limit, min(self.limit, wanted))
        self.num_clamped += limited != wanted
        self.log_alpha = max(self.log_alpha - SLEW, min(self.log_alpha + SLEW, limited))

    def metrics(self) -> dict[str, float]:
        if math.isnan(self.last):
            return {}
        _, d, log_k = self.filters.means()
        return {
            "calibration/measured": self.last,
            "calibration/strength": math.exp(log_k),
            "calibration/holding_alpha": math.exp(-d),
        }

    def counts(self) -> dict[str, float]:
        return {"calibration/skipped": self.num_skipped, "calibration/clamped": self.num_clamped}

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self._STATE}
        return state | {"last": None if math.isnan(self.last) else self.last, "filters": self.filters.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, name, state[name])
        self.last = math.nan if state["last"] is None else state["last"]
        self.filters.load_state(state["filters"])

    _STATE = ("step", "log_alpha", "m", "num_skipped", "num_clamped")
