"""What differs between families of vision-language models: how images stand in tensors, what a body is told
of them, and an image of nothing.

A family is here if its hidden states, z and gradient were compared with its own forward pass
(`tests/models/test_vision.py`). Called by `rcpo.models.vision`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig


def _square(config: PretrainedConfig) -> dict[str, Tensor]:
    """Pixels of one image (1, 3, S, S)."""
    size = config.vision_config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.ones(1, 3, height, width)}


def _tile(config: PretrainedConfig) -> dict[str, Tensor]:
    """Pixels of one row of one tile (1, 1, 3, S, S). Ones: a tile of zeros is taken for padding."""
    return {"pixel_values": _square(config)["pixel_values"][None]}


def _grid(config: PretrainedConfig) -> dict[str, Tensor]:
    """Patches of one image that becomes one token, and its grid: (merge^2, 3 time patch^2) and (1, 3)."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.ones(merge**2, size), "image_grid_thw": torch.tensor([[1, merge, merge]])}


def _nothing_more(config: PretrainedConfig, ids: Tensor, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    return {}


def _with_grids(config: PretrainedConfig, ids: Tensor, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """From which a position of three numbers is made for every token: its own of text, time, row and column
    of an image (M-RoPE)."""
    kinds = (ids == config.image_token_id).int()
    return {"mm_token_type_ids": kinds, "image_grid_thw": pixels["image_grid_thw"]}


def _with_blocks(config: PretrainedConfig, ids: Tensor, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """By which the tokens of one image see each other, those behind them too."""
    return {"token_type_ids": (ids == config.image_token_id).int()}


class Family(NamedTuple):
    """What differs between vision-language models."""

    projector: tuple[str, ...]
    """The modules of the body between tower and text."""
    joined_along: int = 0
    """The dimension of pixel tensors along which images stand."""
    blank: Callable[[PretrainedConfig], dict[str, Tensor]] = _square
    """What the tower is given where a batch has no image."""
    told: Callable[[PretrainedConfig, Tensor, dict[str, Tensor]], dict[str, Tensor]] = _nothing_more
    """What the body is told beside ids and features: of the ids (R, T) and every row's pixels."""
    with_videos: str | None = None
    """The processor's class, where it takes videos too."""
    why_apart: str | None = None
    """Why a prompt cannot be computed once for both responses; None: it can."""
    masks: bool = True
    """Whether any attention kernel may be told who sees whom; else transformers' own masks have to be."""
    for_text_too: bool = False
    """Whether transformers has it as a model of text as well, and text alone asks for less."""


FOLLOWING = "positions of this family follow the images, and prompts stand by themselves so far"
BOTH_WAYS = "the tokens of an image see each other in this family, and prompts stand by themselves so far"
QWEN = Family(("visual.merger",), blank=_grid, told=_with_grids, why_apart=FOLLOWING)
FAMILIES = {
    "llava": Family(("multi_modal_projector",)),
    "idefics3": Family(("connector",), joined_along=1, blank=_tile),
    "smolvlm": Family(("connector",), joined_along=1, blank=_tile, with_videos="SmolVLMProcessor"),
    "internvl": Family(("multi_modal_projector",), with_videos="InternVLProcessor"),
    "qwen2_vl": QWEN._replace(with_videos="Qwen2VLProcessor"),
    "qwen2_5_vl": QWEN._replace(with_videos="Qwen2_5_VLProcessor"),
    "qwen3_vl": QWEN._replace(
        projector=("visual.merger", "visual.deepstack_merger_list"), with_videos="Qwen3VLProcessor"
    ),
    "gemma3": Family(
        ("multi_modal_projector",), told=_with_blocks, why_apart=BOTH_WAYS, masks=False, for_text_too=True
    ),
}
"""By `model_type`."""


def features_of(seen: Any) -> list[Tensor]:
    """All that text layers are given of what a tower made: of Qwen3-VL for its first layers too."""
    layers = getattr(seen, "deepstack_features", None) or []
    return [tensor for part in (seen.pooler_output, *layers) for tensor in part]


def repeat_features(seen: Any, times: int) -> None:
    """Let what a tower made of the images stand `times` times, one after the other."""
    seen.pooler_output = _repeated(seen.pooler_output, times)
    if getattr(seen, "deepstack_features", None) is not None:
        seen.deepstack_features = [_repeated(layer, times) for layer in seen.deepstack_features]


def _repeated(features: Any, times: int) -> Any:
    """A tensor, or one tensor an image."""
    return torch.cat([features] * times) if isinstance(features, Tensor) else list(features) * times
