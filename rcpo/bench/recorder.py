"""What a block measures of the loop that it runs: seconds of each step, peak memory, the first gradient, a
trace.

A step's seconds run from the end of the step before it to its own end: input, reductions, logging and all
that the loop does between steps are in. The processor time of all threads is kept too: where others use the
same cores it is steadier. Called by the loops of `rcpo.bench`.
"""

import itertools
import os
import time
from typing import Any

import torch
from torch import Tensor, nn

from rcpo.bench.profiled import StepProfile
from rcpo.bench.work import Block
from rcpo.models.evaluation import peak_memory_gb

NUM_DIRECTIONS = 2


class BenchDone(Exception):  # noqa: N818 - no error
    """Leaves a loop after its last step."""


class Recorder:
    """One block's measurements."""

    def __init__(self, block: Block, device: torch.device) -> None:
        self.block, self.device = block, device
        self.num_steps = block.num_warmup + block.num_steps
        self.losses: list[float] = []
        self.computed_tokens: list[int] = []
        self.measured: list[bool] = []
        self.gradient: dict[str, list[float]] = {}
        self._ends: list[float] = []
        self._cpu_ends: list[float] = []
        self._load = [os.getloadavg()[0]]
        self._profiler: StepProfile | None = None
        self._profile: dict[str, Any] = {}

    @property
    def wants_gradient(self) -> bool:
        """Whether the loop hands over the gradient of its first step, unclipped."""
        return self.block.mode == "check" and not self.gradient

    def end_step(self, loss: float, computed_tokens: int, measured: bool = False) -> None:
        """A step is through; raises BenchDone after the last one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.losses.append(loss)
        self.computed_tokens.append(computed_tokens)
        self.measured.append(measured)
        num_done = len(self._ends) + 1
        if self._profiler is not None:
            self._profile = self._profiler.stop(self.block.trace)
            self._profiler = None
        if self.block.mode == "profile" and num_done == self.num_steps - 1:
            self._profiler = StepProfile(self.device)
        self._ends.append(time.perf_counter())
        self._cpu_ends.append(time.process_time())
        if num_done == self.num_steps:
            raise BenchDone

    def take_gradient(self, gradients: dict[str, Tensor]) -> None:
        """Keep a few numbers of each parameter's gradient: its norm, and its products with fixed random
        vectors."""
        for number, (name, gradient) in enumerate(gradients.items()):
            generator = torch.Generator().manual_seed(number)
            flat = gradient.detach().double().flatten().cpu()
            directions = [
                torch.randn(len(flat), generator=generator, dtype=torch.float64)
                for _ in range(NUM_DIRECTIONS)
            ]
            self.gradient[name] = [float(flat.norm()), *(float(direction @ flat) for direction in directions)]

    def result(self) -> dict[str, Any]:
        """What the block has found; plain values."""
        first = self.block.num_warmup
        return {
            "seconds": _between(self._ends[max(first - 1, 0) :]),
            "cpu_seconds": _between(self._cpu_ends[max(first - 1, 0) :]),
            "measured": self.measured[first:],
            "computed_tokens": self.computed_tokens[first:],
            "losses": self.losses,
            "gradient": self.gradient,
            "peak_gb": peak_memory_gb(self.device),
            "profile": self._profile,
            "threads": torch.get_num_threads(),
            "load_average": [*self._load, os.getloadavg()[0]],
            "gpu": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
        }


def _between(moments: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(moments)]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The accumulated gradient of every parameter that has one, by name."""
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
