"""Token log-probabilities from hidden states, in chunks, and their sums per response.

Owns the output head's forward and backward: the (tokens x vocabulary) logits never exist as a whole. Does not
know objectives or sides' incentives; while it holds each chunk's error term it hands that to
`rcpo.method.scores`, when asked. Called through `rcpo.models.policy.Policy`.

Shape legend: N response tokens of a batch, T padded tokens a row, V vocabulary, H hidden.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rcpo.data.batch import PairBatch
from rcpo.method.scores import HeadScores, matmul_fp32
from rcpo.models.logit_transform import NOTHING, LogitTransform

CHUNK_ELEMENTS = 2**24
"""On a CPU, logits held at once (fp32 elements, 64 MiB): the chunk is as many tokens as fit, at least 16."""
KEPT_ELEMENTS = 2**25
"""On a CPU, softmax values kept from the forward to the backward pass of a micro-batch (fp32 elements, 128
MiB): their tokens need no second product with the vocabulary, and memory still does not grow with T x V."""
CUDA_CHUNK_TOKENS = 2048
"""On a GPU, tokens of a chunk: a product of 110 to 330, as many as a CPU's limit leaves of real vocabularies,
is bound by memory, of 2,048 by arithmetic. A multiple of 256, the tile of a matrix product there."""
CUDA_KEPT_BYTES = 2 * 10**9
"""On a GPU, what may be kept: in bf16 the error itself, as it multiplies the weights."""


class HeadSizes(NamedTuple):
    """How the head divides its work."""

    chunk_tokens: int
    """Tokens whose logits exist at once."""
    kept_bytes: int
    """Of the chunks kept for the backward pass."""
    keeps_rounded: bool
    """Whether of 16-bit weights a chunk's error is kept in their dtype, as it multiplies them, rather than an
    fp32 softmax of twice the size. A bias then takes its gradient from the rounded error."""


def head_sizes(device_type: str, vocabulary: int) -> HeadSizes:
    """What suits the device."""
    if device_type == "cuda":
        return HeadSizes(CUDA_CHUNK_TOKENS, CUDA_KEPT_BYTES, keeps_rounded=True)
    return HeadSizes(max(16, CHUNK_ELEMENTS // vocabulary), 4 * KEPT_ELEMENTS, keeps_rounded=False)


def logit_bytes(sizes: HeadSizes, vocabulary: int, num_tokens: int, weight_size: int) -> int:
    """Of the logits at their most: a chunk in fp32 and the kept ones, with weights of `weight_size` bytes."""
    of_chunk, of_all = (vocabulary * min(tokens, num_tokens) for tokens in (sizes.chunk_tokens, num_tokens))
    if sizes.keeps_rounded and weight_size == 2:
        return (4 + weight_size) * of_chunk + min(sizes.kept_bytes, weight_size * of_all)
    return min(4 * of_chunk + sizes.kept_bytes, 4 * of_all)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(f(h W^T + b))[target] per token (N,), f the model's `LogitTransform`, mostly none. Chunks
    that fit into `HeadSizes.kept_bytes` are kept for the backward pass; the others' logits are computed again
    there, and so are all where f has a cap, whose slope needs them.

    With e_t = (onehot(target_t) - softmax(logits_t)) f'(x_t), where f'(x) = scale (1 - (f(x)/cap)^2): d
    logp_t / d x_t = e_t, hence grad h_t = g_t W^T e_t, grad W = sum_t g_t e_t h_t^T, grad b = sum_t g_t e_t.
    The factor `scale` is taken out of e_t, and multiplies g_t and the tokens' scores."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        num_chosen: int, scores: HeadScores | None, transform: LogitTransform, sizes: HeadSizes,
        collisions: Tensor | None,
    ) -> Tensor:  # fmt: skip
        token_logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        log_norms = torch.empty_like(token_logps)
        kept: dict[int, _Kept] = {}
        num_kept = 0
        keeps_rounded = sizes.keeps_rounded and weight.dtype != torch.float32
        may_keep = any(ctx.needs_input_grad) and transform.cap is None
        for part in _chunks(hidden.shape[0], num_chosen, sizes.chunk_tokens):
            exps = transform(_logits(hidden[part], weight, bias))
            in_forward = scores is not None and scores.in_forward
            slope = transform.slope(exps) if in_forward else None
            target, largest = exps.gather(1, targets[part, None]).squeeze(1), exps.amax(1)
            sums = exps.sub_(largest[:, None]).exp_().sum(1)
            log_norms[part] = largest + sums.log()
            token_logps[part] = target - log_norms[part]
            if collisions is not None:
                collisions[part] = 2 * (torch.linalg.vector_norm(exps, dim=1).log() - sums.log())
            num_kept += exps.numel() * (weight.element_size() if keeps_rounded else exps.element_size())
            is_kept, error = may_keep and num_kept <= sizes.kept_bytes, None
            if in_forward or (is_kept and keeps_rounded):
                place = exps.clone() if is_kept and not keeps_rounded else exps
                error = _error(place, sums, targets[part], slope).to(weight.dtype)
            if scores is not None and in_forward and error is not None:
                _add_scores(scores, part, num_chosen, error, hidden, transform.scale)
            if is_kept:
                kept[part.start] = _Kept(rounded=error) if keeps_rounded else _Kept(exps, sums)
        ctx.save_for_backward(hidden, targets, log_norms)
        # The parameters, not saved tensors: ZeRO-3 swaps their storage between forward and backward.
        ctx.weight, ctx.bias, ctx.num_chosen, ctx.scores, ctx.kept = weight, bias, num_chosen, scores, kept
        ctx.transform, ctx.sizes = transform, sizes
        return token_logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_token_logps,) = grad_outputs
        hidden, targets, log_norms = ctx.saved_tensors
        weight, bias, scores, transform = ctx.weight, ctx.bias, ctx.scores, ctx.transform
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight: Tensor | None = None
        grad_bias = _zeros_fp32(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for part in _chunks(hidden.shape[0], ctx.num_chosen, ctx.sizes.chunk_tokens):
            is_chosen, own = part.start < ctx.num_chosen, transform.scale * grad_token_logps[part]
            exps, sums, rounded = ctx.kept.pop(part.start, _Kept())
            slope = None
            if exps is None and rounded is None:
                exps = transform(_logits(hidden[part], weight, bias))
                slope = transform.slope(exps)
                exps.sub_(log_norms[part, None]).exp_()
                sums = torch.ones_like(own)
            # The vocabulary-sized error stays as it is; what multiplies it multiplies small factors.
            error = rounded if bias is None or rounded is None else rounded.float()
            if exps is not None:
                error = _error(exps, sums, targets[part], slope)
                rounded = error.to(weight.dtype)  # itself, in fp32
            if scores is not None and not (scores.weighted or scores.in_forward):
                _add_scores(scores, part, ctx.num_chosen, rounded, hidden, transform.scale)
            if grad_hidden is not None:
                grad_hidden[part] = own[:, None] * (rounded @ weight)
            if ctx.needs_input_grad[1]:
                product = matmul_fp32(rounded.T, (own[:, None] * hidden[part]).to(weight.dtype))
                if scores is not None and scores.weighted:
                    scores.add_product(is_chosen, product, None if bias is None else error.T @ own)
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
            elif scores is not None and scores.weighted:
                scores.add(is_chosen, rounded, hidden[part], own)
            if grad_bias is not None:
                grad_bias += error.T @ own
        if grad_weight is None and ctx.needs_input_grad[1]:  # of a side that no answer of the batch has
            grad_weight = torch.zeros_like(weight)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None, None, None, None, None, None,
        )  # fmt: skip


class _Kept(NamedTuple):
    """Of a chunk, from the forward to the backward pass: its softmax times `sums`, or its error."""

    exps: Tensor | None = None
    sums: Tensor | None = None
    rounded: Tensor | None = None


def _error(exps: Tensor, sums: Tensor, targets: Tensor, slope: Tensor | None) -> Tensor:
    """e_t of some tokens (n, V), in the place of `exps`, whose rows add up to `sums`."""
    error = exps.mul_((-1 / sums)[:, None])
    error.scatter_add_(1, targets[:, None], torch.ones_like(sums)[:, None])
    return error if slope is None else error.mul_(slope)


def _add_scores(
    scores: HeadScores, part: slice, num_chosen: int, error: Tensor, hidden: Tensor, scale: float
) -> None:
    """Hand some tokens' own scores on, times their importance and the model's `scale`."""
    importance = None if scores.importance is None else scores.importance[part]
    if scale != 1.0:
        importance = scale * (torch.ones_like(hidden[part, 0]).float() if importance is None else importance)
    scores.add(part.start < num_chosen, error, hidden[part], importance)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = matmul_fp32(hidden, weight.T)
    return logits if bias is None else logits.add_(bias.float())


def _zeros_fp32(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)


def _chunks(num_tokens: int, num_chosen: int, size: int) -> list[slice]:
    """Slices of at most `size` tokens that cover all tokens and never straddle the two sides."""
    starts = [*range(0, num_chosen, size), *range(num_chosen, num_tokens, size)]
    stops = [*starts[1:], num_tokens] if starts else []
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]


class TokenLogProbHead(nn.Module):
    """The model's output projection, read as "log-probability of this token here". Shares the projection's
    parameters.

    A module of its own, so that ZeRO-3 gathers the (possibly tied) weight around its forward and backward.
    """

    def __init__(self, projection: nn.Linear, transform: LogitTransform = NOTHING) -> None:
        super().__init__()
        self.transform = transform
        self.weight = projection.weight
        self.bias = projection.bias
        self.scores: HeadScores | None = None
        """Where the next backward passes add their score statistics; None costs nothing."""
        self.sizes: HeadSizes | None = None
        """How the work is divided; None: as suits the device."""
        self.collisions: Tensor | None = None
        """Where the next pass writes log sum_v p_v^2 of each token's distribution (N,), without a gradient;
        None: nowhere."""

    def forward(self, hidden: Tensor, batch: PairBatch) -> Tensor:
        """Token log-probs (N,) fp32 for `batch`'s response tokens from hidden states (R, T, H)."""
        picked = hidden.flatten(0, 1).index_select(0, batch.token_positions)
        token_logps: Tensor = _TokenLogProbs.apply(
            picked,
            self.weight,
            self.bias,
            batch.targets,
            batch.num_chosen_tokens,
            self.scores,
            self.transform,
            self.sizes or head_sizes(hidden.device.type, self.weight.shape[0]),
            self.collisions,
        )
        return token_logps

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) fp32 of n hidden states (n, H), for those who look at whole distributions; without gradients
        that are worth anything."""
        return self.transform(_logits(hidden, self.weight, self.bias))


def sum_per_side(token_logps: Tensor, batch: PairBatch) -> Tensor:
    """z: (2B,) fp32, token log-probs (N,) summed over each side's response.

    Written through a padded grid, a row a side, because `index_add` on a GPU adds in no fixed order.
    """
    num_tokens, width = len(token_logps), batch.input_ids.shape[1]
    side = side_of_token(batch)
    starts = batch.lengths.cumsum(0) - batch.lengths
    offset = torch.arange(num_tokens, device=side.device) - starts[side]
    grid = torch.zeros(len(batch.lengths), width, dtype=token_logps.dtype, device=token_logps.device)
    return grid.index_put((side, offset), token_logps).sum(1)


def side_of_token(batch: PairBatch) -> Tensor:
    """(N,) int64: which of the 2B sides each response token belongs to."""
    return torch.repeat_interleave(batch.lengths, output_size=len(batch.targets))


LEAST_IMPORTANCE = 1e-6
"""Added to 1 - p, so that a response all of whose tokens are certain has equal weights."""


def importance_weighted(
    token_logps: Tensor, ref_token_logps: Tensor, batch: PairBatch
) -> tuple[Tensor, Tensor]:
    """z (2B,) fp32 = sum_t ref_t + sum_t omega_t (logp_t - ref_t), and omega (N,), detached.

    omega_t = (1 - p_t) / mean of 1 - p over the response. So z - ref is the importance-weighted log-ratio,
    and grad z = sum_t omega_t grad logp_t: incentives, scores and calibration apply to it as to any z.
    """
    importance = 1 - token_logps.detach().exp() + LEAST_IMPORTANCE
    means = sum_per_side(importance, batch) / batch.lengths
    omega = importance / means[side_of_token(batch)]
    return sum_per_side(ref_token_logps + omega * (token_logps - ref_token_logps), batch), omega


def score_shares(batch: PairBatch, omega: Tensor | None, averages: bool) -> Tensor | None:
    """What multiplies each token's score in that of its response (N,): `omega`, or what tokens count in z;
    over |y| where the objective `averages` log-probs; None: 1."""
    omega = batch.token_weights if omega is None else omega
    if not averages:
        return omega
    shares = batch.lengths.float().reciprocal()[side_of_token(batch)]
    return shares if omega is None else omega * shares
