"""The norm of the global gradient: taken before the step is decided on, and handed to DeepSpeed's step.

DeepSpeed takes it inside its step, and waits for the device two to four times to look at it. Here it is one
more number of the step's only reduction; where it is not finite no update follows. DeepSpeed's step is then
given the number. Owns what differs between DeepSpeed's optimizers: all names below are private, hence the
pinned version in pyproject.toml. Called by `rcpo.engine.engine`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn


def group_norms(optimizer: Any, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Norms of the parts of the accumulated global gradient, before clipping: (k,) fp32 on the device, the
    same on every rank; not finite or negative where an entry is not finite. Collective.

    `optimizer` is the one that `deepspeed.initialize` gave back; at stage 0 `parameters` hold whole
    gradients. k is 1 but at stage 3, which has a norm for each of its groups.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return optimizer.scaled_global_norm().reshape(1)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return torch.stack(optimizer._get_norm_groups())
    if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
        gradients, _ = optimizer.get_grads_for_norm()
        return get_global_norm_of_tensors(gradients, norm_type=optimizer.norm_type).reshape(1)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).reshape(1)


def whole_norm(norms: Sequence[float]) -> float:
    """The global gradient's, from those of its parts; inf where one is not a norm."""
    if not all(math.isfinite(norm) and norm >= 0 for norm in norms):
        return math.inf
    if len(norms) == 1:
        return norms[0]
    return float(combine_grad_norm_groups(torch.tensor(norms, dtype=torch.float32)))


@contextmanager
def known(optimizer: Any, norms: Sequence[float]) -> Iterator[None]:
    """While open, a step of `optimizer` finds these norms, all finite, on the host, and takes none."""
    on_host = torch.tensor(norms, dtype=torch.float32)
    told: list[tuple[Any, str, Callable[..., Any]]] = []
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        told = [(optimizer, "scaled_global_norm", lambda: on_host[0])]
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        told = [(optimizer, "_get_norm_groups", lambda: list(on_host))]
    elif isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
        told = [(bf16_optimizer, "get_global_norm_of_tensors", lambda **_: on_host[0])]
    elif isinstance(optimizer, unfused_optimizer.FP16_UnfusedOptimizer):  # of one group
        told = [
            (unfused_optimizer, "get_weight_norm", lambda *_, **__: norms[0]),
            (optimizer.overflow_checker, "check", lambda: False),
        ]
    taken = [(owner, name, getattr(owner, name)) for owner, name, _ in told]
    for owner, name, tell in told:
        setattr(owner, name, tell)
    try:
        yield
    finally:
        for owner, name, take in taken:
            setattr(owner, name, take)
