"""Where the time of rcpo's step goes, by timers around its parts; an extra pass, since timers cost and, on a
GPU, wait.

    head            output head, forward and backward, less what calibration does inside it
    calibration     score vectors and their products; extra forward passes of `exact` count as body
    communication   collectives between ranks
    input           making micro-batches
    optimizer       the engine's step
    body            the rest of the forward and backward passes
    rest            what is left of the loop: metrics, logging

Called by `rcpo.bench.block`.
"""

import time
from typing import Any

import torch

from rcpo.engine.engine import Engine
from rcpo.method import scores
from rcpo.models import logprobs
from rcpo.training import loop

PARTS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("head", logprobs.TokenLogProbHead, ("forward",)),
    ("head", logprobs._TokenLogProbs, ("backward",)),
    ("calibration", scores.HeadScores, ("add", "add_product", "sides", "reset")),
    ("calibration", scores.ParameterScores, ("_take", "_deliver", "sides", "reset")),
    ("communication", torch.distributed, ("all_reduce", "reduce", "broadcast", "barrier")),
    ("communication", torch.distributed, ("all_gather_into_tensor", "reduce_scatter_tensor")),
    ("input", loop, ("micro_batches_of", "mismatched_of", "num_tokens_of")),
    ("optimizer", Engine, ("step",)),
    ("body", Engine, ("logprobs", "backward")),
]
BUCKETS = ("body", "head", "calibration", "communication", "input", "optimizer", "rest")


class Timers:
    """Exclusive seconds by part: what runs inside another part counts for itself alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack = ["rest"]
        self._since = time.perf_counter()
        self.seconds = dict.fromkeys(BUCKETS, 0.0)

    def install(self) -> None:
        """Put timers around all parts, for the rest of this process."""
        for bucket, owner, names in PARTS:
            for name in names:
                self._wrap(bucket, owner, name)

    def restart(self) -> None:
        """Forget what was measured so far: the warm-up."""
        self._turn()
        self.seconds = dict.fromkeys(BUCKETS, 0.0)

    def shares(self) -> dict[str, float]:
        """By part, of the time since `restart`."""
        self._turn()
        total = sum(self.seconds.values())
        return {bucket: value / total for bucket, value in self.seconds.items()}

    def _wrap(self, bucket: str, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._stack.append(bucket)
            try:
                return original(*args, **kwargs)
            finally:
                self._turn()
                self._stack.pop()

        is_static = isinstance(vars(owner).get(name), staticmethod)
        setattr(owner, name, staticmethod(timed) if is_static else timed)

    def _turn(self) -> None:
        """Credit the time since the last turn to the part that is running."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now
