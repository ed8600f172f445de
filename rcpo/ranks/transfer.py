"""Copies from host memory to a device that neither side waits for.

A copy from ordinary memory makes the host wait until the device has done all that was asked of it before.
From pinned memory it is one more thing to do. Called wherever a step is given what the CPU has made."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; itself where it is there already."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
