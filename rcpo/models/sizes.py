"""How many numbers a parameter has, and a model. Knows no adapter and no engine."""

from typing import Any

from torch import nn


def numel(parameter: Any) -> int:
    """Whole at ZeRO 3 too; a 4-bit tensor holds two numbers in a byte."""
    number = int(getattr(parameter, "ds_numel", parameter.numel()))
    return 2 * number if hasattr(parameter, "quant_state") else number


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers."""
    sizes = [(numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
