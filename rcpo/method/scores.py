"""Scores: the two sides' gradient vectors of the global batch, and the products that calibration needs of
them.

Owns `Sides` (this rank's shards of both vectors), `HeadScores` (the output projection through the head path,
filled by the head's own backward in `rcpo.models.logprobs`) and `ParameterScores` (any set of parameters,
captured while autograd delivers their gradients). Does not know alpha, objectives or bands:
`rcpo.training.measurement` decides what is summed.

Norms of per-rank sums do not add up to the norm of their sum, so the vectors themselves are reduced over the
ranks first, each rank keeping one share, and three numbers of each share are added up.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rcpo.ranks.distributed import begin_reduce_scatter, rank, reduce_scatter, world_size

NUMBERS_AT_ONCE = {"cpu": 2**16, "cuda": 2**24}
"""Numbers turned into fp64 together. On a CPU both copies (512 KiB each) stay in its cache: blocks of
2^22, for which the system hands out fresh pages every time, took nine times as long."""
BUCKET_NUMBERS = 2**24
"""Gradient numbers that travel together between ranks (64 MiB of fp32)."""
UNDER_WAY = 2
"""Buckets that travel at a time while a backward pass goes on."""
CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True)
class ScoreGeometry:
    """|v_w|^2, |v_l|^2 and <v_w, v_l> of the two sides' vectors, for the global batch.

    mean: v = s, the gradient of the batch mean of z (of z/|y| where the objective averages log-probs); units
    nats^2/parameter^2. weighted: v = G = (1/B) sum_i
    d_i s_i, the two halves of the loss's real gradient before calibration, grad L = -G_w + G_l.
    """

    chosen_squared: float
    rejected_squared: float
    dot: float
    weighted: bool = False

    @property
    def chosen_norm(self) -> float:
        return math.sqrt(self.chosen_squared)

    @property
    def rejected_norm(self) -> float:
        return math.sqrt(self.rejected_squared)

    @property
    def cosine(self) -> float:
        """rho = cos(v_w, v_l), in [-1, 1]; nan when a side's vector is zero or not finite."""
        product = self.chosen_norm * self.rejected_norm
        if not (product > 0 and math.isfinite(product) and math.isfinite(self.dot)):
            return math.nan  # max and min below would make 1 of a nan
        return max(-1.0, min(1.0, self.dot / product))


class Sides(NamedTuple):
    """This rank's share of both vectors: v_w = chosen_scale * chosen, v_l likewise; parts of one vector in
    order."""

    chosen: list[Tensor]
    rejected: list[Tensor]
    chosen_scale: float
    rejected_scale: float

    def partial_products(self) -> Tensor:
        """This rank's share of (|v_w|^2, |v_l|^2, <v_w, v_l>): (3,) fp64, to be summed over ranks."""
        return torch.stack(
            [
                self.chosen_scale**2 * partial_dot(self.chosen, self.chosen),
                self.rejected_scale**2 * partial_dot(self.rejected, self.rejected),
                self.chosen_scale * self.rejected_scale * partial_dot(self.chosen, self.rejected),
            ]
        )


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with fp32 result, whatever the inputs' dtype: bf16 logits near 20 are spaced 0.125
    apart."""
    if left.dtype == torch.float32 and right.dtype == torch.float32:
        return left @ right
    if left.is_cuda and left.dtype == right.dtype:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def partial_dot(first: Sequence[Tensor], second: Sequence[Tensor], metric: Sequence[Tensor] = ()) -> Tensor:
    """sum of first * second (* metric, where given) over this rank's parts: fp64 scalar, summed in fp64."""
    device = first[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    size = NUMBERS_AT_ONCE.get(device.type, 2**22)
    for parts in zip(first, second, *([metric] if metric else []), strict=True):
        for blocks in zip(*(part.flatten().split(size) for part in parts), strict=True):
            a, b, *weights = (block.double() for block in blocks)
            total += torch.dot(a, weights[0] * b if weights else b)
    return total


class HeadScores:
    """Accumulates both sides' sums over tokens of c_t e_t h_t^T (V x H, and V for a bias) in one optimizer
    step.

    e_t = onehot(target_t) - softmax(logits_t). unweighted: c = 1, or 1/|y| where the objective averages
    log-probs: one more product per chunk of the head's backward. weighted: c_t is the gradient that reaches
    token t, so that the sums are the two parts of the head's own gradient: no product more. Memory: 2 V (H +
    1) fp32 numbers per rank while geometry is measured; weighted: V H more for a chunk's product. Traffic
    with several ranks: one reduce-scatter of both sums.
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        has_bias: bool,
        device: torch.device,
        weighted: bool = False,
        averages: bool = False,
        in_forward: bool = False,
    ) -> None:
        self._has_bias = has_bias
        self.importance: Tensor | None = None
        """What multiplies the tokens' own scores in the coming pass, (N,); None: 1."""
        self.weighted, self.averages = weighted, averages
        self.in_forward = in_forward
        """Whether the forward pass adds up, rather than the backward pass; for unweighted sums."""
        # The reduce-scatter wants equal shares; rows of zeros change no norm.
        rows = -(-vocabulary // world_size()) * world_size()
        self._vocabulary = vocabulary
        width = hidden + 1 if has_bias else hidden
        self._sums = torch.zeros(2, rows, width, dtype=torch.float32, device=device)

    def reset(self) -> None:
        self._sums.zero_()

    def add(self, chosen: bool, error: Tensor, hidden: Tensor, scale: Tensor | None = None) -> None:
        """Add the sum over some tokens of one side of c_t e_t h_t^T: error (n, V) = e_t, fp32 or rounded to
        the weights' dtype as for the gradient itself, hidden (n, H), scale (n,) = c_t, 1 where None."""
        rows = (hidden if scale is None else scale[:, None] * hidden).to(error.dtype)
        side = self._side(chosen)
        if error.dtype == torch.float32:
            side[:, : rows.shape[1]].addmm_(error.T, rows)
        else:
            side[:, : rows.shape[1]] += matmul_fp32(error.T, rows)
        if self._has_bias:
            side[:, -1] += error.sum(0, dtype=torch.float32) if scale is None else error.float().T @ scale

    def add_product(self, chosen: bool, product: Tensor, bias: Tensor | None) -> None:
        """Add an already computed sum over some tokens of one side: product (V, H) fp32, bias (V,)."""
        side = self._side(chosen)
        side[:, : product.shape[1]] += product
        if bias is not None:
            side[:, -1] += bias

    def own_sums(self) -> list[Tensor]:
        """This rank's sums, chosen and rejected; views that `reset` and the next pass change. Their first
        dimension is a multiple of the ranks."""
        return list(self._sums)

    def _side(self, chosen: bool) -> Tensor:
        return self._sums[CHOSEN if chosen else REJECTED, : self._vocabulary]

    def sides(self, chosen_scale: float, rejected_scale: float) -> Sides:
        """This rank's rows of the sums over all ranks. Collective."""
        chosen, rejected = (reduce_scatter(side) for side in self._sums)
        return Sides([chosen], [rejected], chosen_scale, rejected_scale)

    def shares_of(self, full: Sequence[Tensor]) -> list[Tensor]:
        """The parts of `sides` of a vector given as [weight (V, H), bias (V,) or nothing]."""
        columns = [full[0].float(), *(bias.float()[:, None] for bias in full[1:])]
        whole = torch.zeros_like(self._sums[0])
        whole[: self._vocabulary] = torch.cat(columns, dim=1)
        return [whole.chunk(world_size())[rank()]]


class _Bucket(NamedTuple):
    members: list[int]
    numel: int
    """Padded to a multiple of the ranks."""


class ParameterScores:
    """Both sides' gradients with respect to a set of parameters, captured while backward passes deliver them.

    Memory per rank: 2 P/N fp32 numbers for P parameters and N ranks, and up to a few buckets of
    `BUCKET_NUMBERS`. Traffic with several ranks: one reduce-scatter of P fp32 numbers per captured backward
    pass, none with one rank; up to `UNDER_WAY` of them travel while the pass goes on. Two passes where one
    was also double the engine's own gradient traffic at ZeRO 2 and 3, with more gathers at 3
    (`rcpo.bench.traffic` computes it all by stage). Peak resident memory of a rank after four steps was 242
    MB higher at ZeRO 0, 335 at 1, 306 at 2, 284 at 3 (P = 19 M, 77 MB; two ranks on CPU): the shards, the
    buckets under way, and what the CPU allocator keeps.

    Why not as differences of the partitions that the engine reduces anyway. At ZeRO 0 and 1 it reduces once
    a step, when both sides are in one sum. At 2 and 3 it reduces after every pass, but adds what arrives to
    the sum of all passes before: (S + g) - S is g with the rounding of S + g, which is relative to S. Where
    the sides nearly cancel, or late in a step of many micro-batches, that is far above g's own; and the
    product of two differences would be what tells displacement. In fp32 other bits than these.

    Works at every ZeRO stage, because a leaf's hook sees the rank's own whole gradient before the engine
    does.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], device: torch.device, others: Sequence[nn.Parameter] = ()
    ) -> None:
        """`others` are not measured, but train too: they see nothing of a pass that the engine is to see
        nothing of."""
        self._parameters, self._others = list(parameters), list(others)
        self._numels = [int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in parameters]
        self._buckets: list[_Bucket] = []
        self._places: dict[int, tuple[int, int]] = {}
        # Gradients arrive from the last layer to the first; parameters of one bucket should arrive together.
        for idx in reversed(range(len(self._parameters))):
            self._place(idx)
        self._buckets = [
            bucket._replace(numel=-(-bucket.numel // world_size()) * world_size()) for bucket in self._buckets
        ]
        self._shards = [
            [torch.zeros(bucket.numel // world_size(), device=device) for bucket in self._buckets]
            for _ in (CHOSEN, REJECTED)
        ]
        self._arriving: dict[int, tuple[Tensor, set[int]]] = {}
        self._under_way: list[tuple[Tensor, Callable[[], Tensor]]] = []
        """Shards, and what waits for their part of a bucket that travels; in the order of their start."""

    def _place(self, idx: int) -> None:
        numel = self._numels[idx]
        if not self._buckets or self._buckets[-1].numel + numel > BUCKET_NUMBERS:
            self._buckets.append(_Bucket([], 0))
        bucket = self._buckets[-1]
        self._places[idx] = (len(self._buckets) - 1, bucket.numel)
        self._buckets[-1] = _Bucket([*bucket.members, idx], bucket.numel + numel)

    def reset(self) -> None:
        for side in self._shards:
            for shard in side:
                shard.zero_()

    @contextmanager
    def capture(self, side: int, keep_gradient: bool) -> Iterator[None]:
        """While open, one backward pass adds its gradients to `side`; without `keep_gradient` the engine gets
        zeros. Collective."""
        handles = [
            parameter.register_hook(partial(self._take, idx, side, keep_gradient))
            for idx, parameter in enumerate(self._parameters)
        ]
        if not keep_gradient:
            handles += [parameter.register_hook(torch.zeros_like) for parameter in self._others]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for number in sorted(self._arriving):  # where a parameter had no part in the pass
            self._deliver(number, side)
        self._add_arrived(0)

    def _take(self, idx: int, side: int, keep_gradient: bool, gradient: Tensor) -> Tensor | None:
        number, start = self._places[idx]
        bucket = self._buckets[number]
        if number not in self._arriving:
            # With one rank the shard is the bucket, and nothing has to wait.
            flat = (
                self._shards[side][number]
                if world_size() == 1
                else torch.zeros(bucket.numel, device=gradient.device)
            )
            self._arriving[number] = (flat, set(bucket.members))
        flat, missing = self._arriving[number]
        flat[start : start + self._numels[idx]] += gradient.detach().flatten()
        missing.discard(idx)
        if not missing:
            self._deliver(number, side)
        return None if keep_gradient else torch.zeros_like(gradient)

    def _deliver(self, number: int, side: int) -> None:
        flat, _ = self._arriving.pop(number)
        if world_size() > 1:
            self._add_arrived(UNDER_WAY - 1)
            self._under_way.append((self._shards[side][number], begin_reduce_scatter(flat)))

    def _add_arrived(self, num_left: int) -> None:
        """Wait for all but the last buckets under way, and add them to their shards."""
        while len(self._under_way) > num_left:
            shard, wait = self._under_way.pop(0)
            shard += wait()

    def sides(self, chosen_scale: float, rejected_scale: float) -> Sides:
        """This rank's shards of the sums over all captured passes and ranks; views that the next capture
        changes."""
        return Sides(self._shards[CHOSEN], self._shards[REJECTED], chosen_scale, rejected_scale)

    def shares_of(self, full: Iterator[Tensor]) -> list[Tensor]:
        """The parts of `sides` of a vector given parameter by parameter, in the order of the parameters."""
        shares = [torch.zeros_like(shard) for shard in self._shards[CHOSEN]]
        for idx, whole in enumerate(full):
            number, start = self._places[idx]
            share = shares[number]
            first = rank() * share.numel()
            low, high = max(start, first), min(start + self._numels[idx], first + share.numel())
            if low < high:
                share[low - first : high - first] = whole.flatten()[low - start : high - start]
        return shares
