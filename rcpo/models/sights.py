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


def with_grids(config: PretrainedConfig, ids: Tensor, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """From which a position of three numbers is made for every token: its own of text, time, row and column
    of an image (M-RoPE)."""
    kinds = (ids == config.image_token_id).int()
    return {"mm_token_type_ids": kinds, "image_grid_thw": pixels["image_grid_thw"]}


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


FAMILIES = {
    "llava": Family(("multi_modal_projector",)),
    "idefics3": Family(("connector",), joined_along=1, blank=_tile),
    "smolvlm": Family(("connector",), joined_along=1, blank=_tile, with_videos="SmolVLMProcessor"),
    "internvl": Family(("multi_modal_projector",), with_videos="InternVLProcessor"),
    "qwen2_vl": Family(("visual.merger",), blank=_grid, told=with_grids, with_videos="Qwen2VLProcessor"),
    "qwen2_5_vl": Family(("visual.merger",), blank=_grid, told=with_grids, with_videos="Qwen2_5_VLProcessor"),
    "qwen3_vl": Family(
        ("visual.merger", "visual.deepstack_merger_list"),
        blank=_grid,
        told=with_grids,
        with_videos="Qwen3VLProcessor",
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
