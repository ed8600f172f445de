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


class Family(NamedTuple):
    """What differs between vision-language models."""

    projector: str
    """The module of the body between tower and text."""
    joined_along: int = 0
    """The dimension of pixel tensors along which images stand."""
    blank: Callable[[PretrainedConfig], dict[str, Tensor]] = _square
    """What the tower is given where a batch has no image."""


FAMILIES = {
    "llava": Family("multi_modal_projector"),
    "idefics3": Family("connector", joined_along=1, blank=_tile),
}
"""By `model_type`."""


def doubled(features: Any, times: int) -> Any:
    """Features of images, `times` times one after the other: a tensor, or a list of one tensor an image."""
    if isinstance(features, Tensor):
        return torch.cat([features] * times)
    return list(features) * times
