"""Attention kernels: which token sees which, in the words of each, and the sdpa that never looks at the mask.

transformers reads positions and masks in every forward pass, to find out whether rows are packed or padded:
the host waits for the device each time. rcpo pads on the right and lays packed rows out itself, so it knows.
Called by `rcpo.models.load` and `rcpo.models.policy`."""

import importlib.util
import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import PairBatch, Segments
from rcpo.models.kernels import (
    FLEX,
    VARLEN,
    block_mask,
    block_masked_attention,
    has_varlen,
    varlen_attention,
)
from rcpo.models.logit_transform import body_of

UNREAD_SDPA = "rcpo_sdpa"
"""transformers' sdpa under a name of ours, for which a mask of two dimensions stands for rows padded on the
right: it is given, so that positions are not read, and not read itself."""


def _unread_mask(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
    """transformers' mask of sdpa for rows that are whole or padded on the right, windows and all."""
    return sdpa_mask(*args, attention_mask=None, **options)


def leave_masks_unread(model: PreTrainedModel) -> None:
    """Let a model that attends by sdpa do so without a look at its masks; others stay as they are, and so do
    those whose code asks for the name sdpa."""
    if model.config._attn_implementation != "sdpa" or _asks_for_sdpa(model):
        return
    AttentionInterface.register(UNREAD_SDPA, sdpa_attention_forward)
    AttentionMaskInterface.register(UNREAD_SDPA, _unread_mask)
    if type(model)._can_set_attn_implementation():
        model.set_attn_implementation(UNREAD_SDPA)


def _asks_for_sdpa(model: PreTrainedModel) -> bool:
    """By the source of the model's own module, as transformers itself finds out what a model can do."""
    try:
        return '_attn_implementation == "sdpa"' in inspect.getsource(sys.modules[type(model).__module__])
    except (OSError, TypeError, KeyError):
        return True


TAKES_NO_MASK = "takes no mask; type model.attention=sdpa, or flex_attention on GPUs"


def transformers_name(attention: str) -> str:
    """What transformers calls `model.attention`."""
    if attention == "varlen":
        AttentionInterface.register(VARLEN, varlen_attention)
        return VARLEN
    if attention == "flex_attention":
        AttentionInterface.register(FLEX, block_masked_attention)
        return FLEX
    return attention


def is_flash(kernel: str) -> bool:
    """Whether it takes where sequences begin in place of a mask: flash attention from a wheel, from the hub
    or torch's own."""
    return kernel == VARLEN or kernel.startswith("flash_attention") or "/" in kernel


def check_attention(config: ResolvedConfig) -> None:
    """Raise UserError where `model.attention` cannot work here; loads no model."""
    attention, why = config.model.attention, None
    if attention in (None, "eager", "sdpa"):
        return
    assert attention is not None
    if config.train.device == "cpu":
        why = "runs on GPUs alone"
    elif config.model.dtype == "float32" and attention != "flex_attention":
        why = "takes no fp32; type model.dtype=bfloat16, or"
    elif "/" in attention and importlib.util.find_spec("kernels") is None:
        why = "is fetched from the hub by the kernels package; pip install kernels, or"
    elif attention == "varlen" and not has_varlen():
        why = "is not in this torch as in 2.13; pip install --upgrade torch, or"
    if why is not None:
        raise UserError(
            f"model.attention={attention}: {why}{'' if why.endswith('or') else ';'} type model.attention=sdpa"
        )


def attention_inputs(model: PreTrainedModel, batch: PairBatch) -> dict[str, Any]:
    """What the model's body is told beside the ids.

    Padded rows: nothing, or that no mask is to be looked for. Joint layouts: positions and a mask (R, 1, T,
    T), as bool for sdpa and as what is added to the scores for eager. FlexAttention gets a block mask in
    both. flash attention takes none, but where the sequences of a packed row begin.
    """
    kernel, segments = model.config._attn_implementation, batch.segments
    if kernel == FLEX:
        mask = block_mask(segments, batch.input_ids.shape, batch.input_ids.device)
        return {"attention_mask": mask} | _positions(batch)
    if segments is None:
        if kernel != UNREAD_SDPA:
            return {}
        return {"attention_mask": torch.ones_like(batch.input_ids, dtype=torch.bool)}
    if is_flash(kernel):
        return {"attention_mask": None} | _positions(batch) | _sequences(model, segments)
    seen = segments.seen().unsqueeze(1)
    if kernel not in ("sdpa", UNREAD_SDPA):
        dtype = model.dtype
        seen = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {"attention_mask": seen} | _positions(batch)


def _positions(batch: PairBatch) -> dict[str, Any]:
    return {} if batch.position_ids is None else {"position_ids": batch.position_ids}


def _sequences(model: PreTrainedModel, segments: Segments) -> dict[str, Any]:
    """Where each sequence of a packed row begins, for a body that hands on what it does not know; else
    transformers reads it off the positions, in every layer."""
    if segments.starts is None or not _hands_on(model):
        return {}
    starts, longest = segments.starts, segments.longest
    return {
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def _hands_on(model: PreTrainedModel) -> bool:
    kinds = {each.kind for each in inspect.signature(body_of(model).forward).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


FULL = {"full_attention", "attention"}
WINDOWS = (
    "sliding_window",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
)
"""Config entries of a window, where `layer_types` does not tell."""


def refuse_joint_layout(model: PreTrainedModel, share_prefix: bool) -> None:
    """Raise UserError where a prompt cannot be computed once for both responses, or sequences cannot share a
    row: attention without masks, positions that are not given, windows that a mask of one's own would do
    away with, or layers with a state. What the config does not tell, `rcpo.training.agreement` finds."""
    name = type(model).__name__
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = sorted(kind for kind in kinds if "attention" not in kind or kind == "linear_attention")
    takes = inspect.signature(body_of(model).forward).parameters
    kernel = model.config._attn_implementation
    why = None
    masks = kernel in ("sdpa", UNREAD_SDPA, "eager", FLEX)
    if not masks and (share_prefix or not is_flash(kernel)):
        why = f"{kernel.removeprefix('rcpo_')} {TAKES_NO_MASK}"
    elif kernel == VARLEN and not _hands_on(model):
        why = "its forward method does not hand on where sequences begin; type model.attention=sdpa"
    elif recurrent:
        why = f"a {recurrent[0]} layer goes on from what stands before on the row"
    elif kinds - FULL or any(getattr(config, key, None) is not None for key in WINDOWS):
        why = "it attends within windows"
    elif not {"position_ids", "attention_mask"} <= set(takes):
        why = "it takes no position_ids"
    if why is not None:
        key, what = (
            ("share_prefix", "compute a prompt once for both responses")
            if share_prefix
            else ("packing", "have several sequences on a row")
        )
        raise UserError(f"train.{key}=true: {name} cannot {what}: {why}; or type train.{key}=false")
