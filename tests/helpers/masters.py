"""The fp32 weights that an engine steps, written down before and after every step of a training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file, save_file
from torch import Tensor

from rcpo.engine.engine import Engine
from rcpo.ranks.distributed import rank


def record_masters(folder: Path) -> None:
    """Let every step of this process leave `step-N.safetensors` in `folder`, step-0 from before the first."""
    step = Engine.step

    def step_and_write(engine: Engine, gradient_norms: Sequence[float]) -> None:
        if not (folder / "step-0.safetensors").exists():
            _write(engine, folder)
        step(engine, gradient_norms)
        _write(engine, folder)

    folder.mkdir(exist_ok=True)
    Engine.step = step_and_write  # type: ignore[method-assign]


def _write(engine: Engine, folder: Path) -> None:
    """Collective."""
    found = {}
    stepped = engine._optimizer.param_groups[0]["params"]
    for number, (name, parameter) in enumerate(engine.policy.model.named_parameters()):
        master = stepped[number] if engine.stage == 0 else safe_get_full_fp32_param(parameter)
        found[name] = master.detach().clone()
        assert found[name].dtype == torch.float32
    if rank() == 0:
        save_file(found, folder / f"step-{len(list(folder.iterdir()))}.safetensors")


def masters(folder: Path) -> list[dict[str, Tensor]]:
    """What was written, in the order of the steps."""
    return [load_file(folder / f"step-{number}.safetensors") for number in range(len(list(folder.iterdir())))]
