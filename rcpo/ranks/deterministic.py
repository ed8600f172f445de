"""train.deterministic: the same run twice gives the same bits, where the machine has kernels that do.

Owns what torch, cuBLAS and flash attention are told in a rank. cuBLAS reads its variable when it starts, so
this comes before a device is touched. Called by `rcpo.launch.worker`.
"""

import contextlib
import os
from collections.abc import Iterator

from rcpo.common.errors import UserError

VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
"""What cuBLAS and transformers read; a value that is there already stays."""


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """While open, and `wanted`, torch takes algorithms that give one result, or raises where it has none."""
    if not wanted:
        yield
        return
    import torch

    missing = [name for name in VARIABLES if name not in os.environ]
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    os.environ.update({name: VARIABLES[name] for name in missing})
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # It would write nan into the padding of DeepSpeed's buffers, and norms are taken over that.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextlib.contextmanager
def missing_algorithms_refused() -> Iterator[None]:
    """Turn what torch raises where it has no such algorithm into a UserError."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0] if str(error) else ""
        if "does not have a deterministic implementation" not in said:
            raise
        raise UserError(
            f"train.deterministic=true: {said.split(', but you set')[0][:200]}; type "
            "train.deterministic=false, or another model.attention"
        ) from error
