"""Attention through torch's own kernels for packed rows and for masks with structure, as transformers calls
attention.

varlen: flash attention over sequences that lie one behind the other; no package, no mask, no wait. flex:
FlexAttention, which skips the blocks of a mask where nobody sees anybody: a shared prompt costs what is seen,
and no (T, T) matrix is read. Which tokens see which is decided in `rcpo.models.attention`.

Shape legend: R rows, T tokens a row, A heads, D numbers a head.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from rcpo.common.errors import UserError
from rcpo.data.batch import PREFIX, Segments

VARLEN, FLEX = "rcpo_varlen", "rcpo_flex"
"""Their names within transformers."""
NOT_TAKEN = {
    "softcap": "a soft cap",
    "s_aux": "sinks",
    "position_bias": "a bias of positions",
    "sliding_window": "windows",
}
"""What some architectures add to attention."""


def _refuse(module: nn.Module, name: str, options: dict[str, Any]) -> None:
    found = next((what for key, what in NOT_TAKEN.items() if options.get(key) is not None), None)
    if found is not None:
        raise UserError(
            f"model.attention={name}: {type(module).__name__} attends with {found}, which this kernel does "
            "not take; type model.attention=eager"
        )


def has_varlen() -> bool:
    """Whether torch has the kernel, with fewer key heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """(R, T, A, D) from query (R, A, T, D) and key and value, which may have fewer heads. Sequences begin
    where `cu_seq_lens_q` (S + 1,) says, else with the rows."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse(module, "varlen", options)
    num_rows, num_heads, length, _ = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        ends = torch.arange(0, num_rows * length + 1, length, dtype=torch.int32, device=query.device)
        cu_seq_lens_q, max_length_q = ends, length
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    made: Any = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=num_heads != key.shape[1],
    )  # fmt: skip
    return made.unflatten(0, (num_rows, length)), None


def block_masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The same under a block mask."""
    _refuse(module, "flex_attention", options)
    made: Tensor = _flex(query.device.type)(
        query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return made.transpose(1, 2).contiguous(), None


@functools.cache
def _flex(device_type: str) -> Any:
    """FlexAttention, compiled where it is fast only so."""
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


def block_mask(segments: Segments | None, shape: torch.Size, device: torch.device) -> BlockMask:
    """For rows of `shape` (R, T): who sees whom, in a joint layout as `Segments.seen` says, else every token
    those before it on its row."""

    num_rows, length = shape

    def causal(row: Tensor, head: Tensor, now: Tensor, before: Tensor) -> Tensor:
        return now >= before

    def joint(row: Tensor, head: Tensor, now: Tensor, before: Tensor) -> Tensor:
        assert segments is not None
        part = segments.part[row, before]
        is_seen = (part == segments.part[row, now]) | (part == PREFIX)
        return (now >= before) & is_seen & (segments.pair[row, before] == segments.pair[row, now])

    return create_block_mask(
        causal if segments is None else joint, None if segments is None else num_rows, None, length, length,
        device=device, _compile=device.type == "cuda",  # else a (T, T) matrix of the whole mask is made first
    )  # fmt: skip
