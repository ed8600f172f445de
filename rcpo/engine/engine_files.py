"""DeepSpeed's own files in a checkpoint: how they are written, and turned into those of another spreading.
Called by `rcpo.engine.engine`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from rcpo.common.errors import UserError
from rcpo.common.files import FileEntry, HashedFile, entry_of

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
    weights of other names than `kept`. A file is hashed while it is written."""

    def __init__(self, inner: Any, kept: set[str] | None) -> None:
        self.inner, self._kept = inner, kept
        self.fault: Exception | None = None
        self.written: dict[Path, FileEntry] = {}
        """By this rank."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if self._kept is not None and "module" in state_dict:
            module = {name: value for name, value in state_dict["module"].items() if name in self._kept}
            state_dict = state_dict | {"module": module}
        place = Path(path)
        try:
            if isinstance(self.inner, TorchCheckpointEngine):
                with HashedFile(place) as stream:
                    self.inner.save(state_dict, stream)
                self.written[place] = stream.entry()
            else:  # one that deepspeed.extra asks for
                self.inner.save(state_dict, path)
                self.written[place] = entry_of(place)
        except (OSError, RuntimeError) as error:
            self.fault = self.fault or error
