"""DeepSpeed's own files in a checkpoint: how they are written, and turned into those of another spreading.
Called by `rcpo.models.engine`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError

ENGINE_TAG = "engine"
"""DeepSpeed's name for the one checkpoint inside a folder that rcpo names and completes by itself."""


def convert_to_universal(source: Path, target: Path) -> None:
    """By DeepSpeed's own converter, in a process of its own: it forks workers."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"{source}: DeepSpeed's converter to its universal format failed ({last[:300]})")


class Writer:
    """DeepSpeed's checkpoint engine, whose `save` remembers a fault in place of raising it, and leaves out
    weights of other names than `kept`."""

    def __init__(self, inner: Any, kept: set[str] | None) -> None:
        self.inner, self._kept = inner, kept
        self.fault: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def save(self, state_dict: dict[str, Any], path: str) -> Any:
        if self._kept is not None and "module" in state_dict:
            module = {name: value for name, value in state_dict["module"].items() if name in self._kept}
            state_dict = state_dict | {"module": module}
        try:
            return self.inner.save(state_dict, path)
        except (OSError, RuntimeError) as error:
            self.fault = self.fault or error
