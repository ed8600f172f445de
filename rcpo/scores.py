"""Scores: the geometry of the two sides' gradients of z, for the global batch.

Owns the sums S_w = sum_i grad z_w,i and S_l with respect to the output projection, through the head path only
(with tied embeddings too), and the three numbers that calibration needs of them. Filled by the head's own
backward (`rcpo.logprobs`), read by `rcpo.step`. Does not know alpha, objectives or bands.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

ROWS_AT_ONCE = 4096
"""Vocabulary rows turned into fp64 together: the whole sums as fp64 would need twice their own memory
again."""


@dataclass(frozen=True)
class ScoreGeometry:
    """|s_w|^2, |s_l|^2 and <s_w, s_l>, where s = grad of the batch mean of z; units nats^2/parameter^2."""

    chosen_squared: float
    rejected_squared: float
    dot: float

    @property
    def chosen_norm(self) -> float:
        return math.sqrt(self.chosen_squared)

    @property
    def rejected_norm(self) -> float:
        return math.sqrt(self.rejected_squared)

    @property
    def cosine(self) -> float:
        """rho = cos(s_w, s_l), in [-1, 1]; nan when a side's score is zero or not finite."""
        product = self.chosen_norm * self.rejected_norm
        if not (product > 0 and math.isfinite(product) and math.isfinite(self.dot)):
            return math.nan  # max and min below would make 1 of a nan
        return max(-1.0, min(1.0, self.dot / product))


class HeadScores:
    """Accumulates S_w and S_l (each V x H, and V for a bias) over the micro-batches of one optimizer step.

    Memory: 2 V (H + 1) fp32 numbers per rank while geometry is measured. Time: one more product per chunk of
    the head's backward. Traffic with several ranks: one reduce-scatter of both sums.
    """

    def __init__(self, vocabulary: int, hidden: int, has_bias: bool, device: torch.device) -> None:
        self._width = hidden + 1 if has_bias else hidden
        self._has_bias = has_bias
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        # The reduce-scatter wants equal shares; rows of zeros change no norm.
        rows = -(-vocabulary // ranks) * ranks
        self._vocabulary = vocabulary
        self._sums = torch.zeros(2, rows, self._width, dtype=torch.float32, device=device)

    def reset(self) -> None:
        self._sums.zero_()

    def add(self, chosen: bool, error: Tensor, hidden: Tensor) -> None:
        """Add sum_t e_t h_t^T of some tokens of one side: error (n, V) fp32 = onehot - softmax, hidden (n,
        H)."""
        rows = hidden.float()
        if self._has_bias:
            rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
        self._sums[0 if chosen else 1, : self._vocabulary].addmm_(error.T, rows)

    def partial_squares(self) -> Tensor:
        """This rank's share of (|S_w|^2, |S_l|^2, <S_w, S_l>) of the *global* batch: (3,) fp64, to be summed
        over ranks.

        Norms of per-rank sums do not add up to the global norm, so the sums themselves are reduced first.
        """
        sums: Tensor | list[Tensor] = self._sums
        if dist.is_initialized() and dist.get_world_size() > 1:
            shares = [torch.empty_like(side[: side.shape[0] // dist.get_world_size()]) for side in sums]
            for share, side in zip(shares, sums, strict=True):
                dist.reduce_scatter_tensor(share, side)
            sums = shares
        squares = torch.zeros(3, dtype=torch.float64, device=self._sums.device)
        for block in zip(sums[0].split(ROWS_AT_ONCE), sums[1].split(ROWS_AT_ONCE), strict=True):
            chosen, rejected = (side.double().flatten() for side in block)
            squares += torch.stack([chosen @ chosen, rejected @ rejected, chosen @ rejected])
        return squares


def geometry_of_mean(squares: list[float], num_pairs: int) -> ScoreGeometry:
    """Geometry of s = S/B from the globally summed `partial_squares` and the number of pairs B."""
    chosen_squared, rejected_squared, dot = (value / num_pairs**2 for value in squares)
    return ScoreGeometry(chosen_squared, rejected_squared, dot)
