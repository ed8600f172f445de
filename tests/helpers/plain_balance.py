"""The oracle of calibration=balance: its formulas by dense Gaussian conditioning, nothing recursive.

Takes nothing of rcpo: all constants stand here once more. Slow, for a few steps."""

import math

import numpy as np
from numpy.typing import NDArray

POLE, WALK, SLEW, PROBE_NATS, FORGET = 0.8, 0.015, 0.2, 0.003, 0.98
STRENGTHS = [10.0 ** (exponent / 4) for exponent in range(-16, 13)]
NOISES = (0.03, 0.1, 0.3)
DRIFTS = (0.02, 0.1, 0.4, 1.2)

Vector = NDArray[np.float64]


class PlainBalance:
    """log alpha of each step from all measurements so far, nothing recursive but the optimizer's momentum."""

    def __init__(self, momentum: float, limit: float = 1.0) -> None:
        self.momentum, self.limit = momentum, limit
        self.log_alpha = 0.0
        self._log_alphas: list[float] = []
        self._shares: list[float] = []
        self._measured: dict[int, float] = {}

    def step(self, measured: float | None, share: float = 1.0) -> None:
        """An optimizer step at `share` of the peak learning rate, before which c was `measured`."""
        if measured is not None:
            self._measured[len(self._shares)] = measured
        self._shares.append(share)
        self._log_alphas.append(self.log_alpha)
        self.log_alpha = self._decided()

    def _momenta(self) -> list[float]:
        """m(t): the mean of log alphas with weights b^age."""
        b = self.momentum
        momenta = []
        for step in range(len(self._log_alphas)):
            weights = [b ** (step - before) for before in range(step + 1)]
            held = sum(
                weight * value for weight, value in zip(weights, self._log_alphas[: step + 1], strict=True)
            )
            momenta.append(held / sum(weights))
        return momenta

    def _decided(self) -> float:
        momenta = self._momenta()
        step = len(momenta)
        found = [
            (k, *self._conditioned(k, eta, drift, momenta))
            for k in STRENGTHS
            for eta in NOISES
            for drift in DRIFTS
        ]
        top = max(log_weight for _, _, _, log_weight in found)
        weights = [math.sqrt(k) * math.exp(log_weight - top) for k, _, _, log_weight in found]
        c = sum(weight * each[1] for weight, each in zip(weights, found, strict=True)) / sum(weights)
        d = sum(weight * each[2] for weight, each in zip(weights, found, strict=True)) / sum(weights)
        # The step that comes: 1 - b, of a mean with b^age over step + 1 values.
        new = 1 / sum(self.momentum**age for age in range(step + 1))
        u_star = -d
        a, g = (1 - POLE) ** 2 / new, (1 - new - POLE**2) / new
        wanted = u_star - a * c - g * (momenta[-1] - u_star)
        limited = min(max(wanted, -self.limit), self.limit)
        return min(max(limited, self.log_alpha - SLEW), self.log_alpha + SLEW)

    def _conditioned(
        self, k: float, eta: float, drift: float, momenta: list[float]
    ) -> tuple[float, float, float]:
        """Means of c/k and d now, given what was measured, and the log weight: c(t) = sum_{s<t} share (m + d
        + noise) with d(t) = d(0) + steps of its walk are linear in independent normal numbers."""
        num = len(momenta)
        # d(0), walk(1..num), noise(0..num-1)
        sizes = np.array([drift, *[min(WALK, drift / 10)] * num, *[eta] * num])
        d_rows = np.zeros((num + 1, len(sizes)))
        c_rows = np.zeros((num + 1, len(sizes)))
        c_means = np.zeros(num + 1)
        for step in range(num + 1):
            d_rows[step, : step + 1] = 1
        for step in range(num):
            share = self._shares[step]
            c_rows[step + 1] = c_rows[step] + share * d_rows[step]
            c_rows[step + 1, 1 + num + step] += share
            c_means[step + 1] = c_means[step] + share * momenta[step]
        c_rows, d_rows = c_rows * sizes, d_rows * sizes
        steps = sorted(self._measured)
        log_weight = 0.0
        for idx, step in enumerate(steps):  # each measurement, foretold from those before it
            mean, variance = self._foretold(k, c_rows, c_means, steps[:idx], step)
            error = self._measured[step] / k - mean
            log_weight = FORGET * log_weight - 0.5 * (error**2 / variance + math.log(variance)) - math.log(k)
        return (
            self._mean(k, c_rows, c_means, steps, c_rows[num], c_means[num]),
            self._mean(k, c_rows, c_means, steps, d_rows[num], 0.0),
            log_weight,
        )

    def _foretold(
        self, k: float, c_rows: Vector, c_means: Vector, known: list[int], step: int
    ) -> tuple[float, float]:
        rows, noise = c_rows[known], (PROBE_NATS / k) ** 2
        mean = self._mean(k, c_rows, c_means, known, c_rows[step], c_means[step])
        across = rows @ c_rows[step]
        spread = rows @ rows.T + noise * np.eye(len(known))
        explained = across @ np.linalg.solve(spread, across) if known else 0.0
        return mean, float(c_rows[step] @ c_rows[step] + noise - explained)

    def _mean(
        self, k: float, c_rows: Vector, c_means: Vector, known: list[int], row: Vector, mean: float
    ) -> float:
        if not known:
            return float(mean)
        rows = c_rows[known]
        spread = rows @ rows.T + (PROBE_NATS / k) ** 2 * np.eye(len(known))
        errors = np.array([self._measured[step] / k for step in known]) - c_means[known]
        return float(mean + row @ rows.T @ np.linalg.solve(spread, errors))
