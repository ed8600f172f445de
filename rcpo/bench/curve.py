"""Memory of the output head, forward and backward, against the number of response tokens: rcpo's and that of
full logits. Called by `rcpo.commands.bench`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpo.data.batch import PairBatch
from rcpo.models.logprobs import TokenLogProbHead

TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
LARGEST_FULL = 2**31
"""Bytes of full logits beyond which they are not tried."""


class Point(NamedTuple):
    """Peak above what is held anyway: hidden states, weights and their gradients. GB of 10^9 bytes."""

    num_tokens: int
    chunked_gb: float
    full_gb: float | None
    """None where full logits would be too large to try."""


def head_curve(vocabulary: int, hidden_size: int, device: torch.device) -> list[Point]:
    """One point for each number of tokens; on CPU only where the system tells and forgets peaks (Linux)."""
    projection = torch.nn.Linear(hidden_size, vocabulary, bias=False, device=device)
    head = TokenLogProbHead(projection)

    def chunked(hidden: Tensor, targets: Tensor) -> Tensor:
        num = len(targets)
        batch = PairBatch(
            input_ids=targets[None],
            token_positions=torch.arange(num, device=device),
            targets=targets,
            lengths=torch.tensor([num, 0], device=device),
            num_chosen_tokens=num,
        )
        return head(hidden[None], batch)

    def full(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.log_softmax(projection(hidden).float(), dim=-1).gather(1, targets[:, None]).squeeze(1)

    points = []
    for num in TOKENS:
        hidden = torch.randn(num, hidden_size, device=device, requires_grad=True)
        targets = torch.randint(vocabulary, (num,), device=device)
        is_tried = 4 * num * vocabulary <= LARGEST_FULL
        points.append(
            Point(
                num,
                _peak(partial(chunked, hidden, targets), projection, device),
                _peak(partial(full, hidden, targets), projection, device) if is_tried else None,
            )
        )
    return points


def _peak(head: Callable[[], Tensor], projection: torch.nn.Linear, device: torch.device) -> float:
    """GB that forward and backward take at their peak, above what is there with the gradient in place."""
    projection.weight.grad = torch.zeros_like(projection.weight)
    reset_peak(device)
    before = peak_bytes(device)
    head().sum().backward()
    return (peak_bytes(device) - before) / 1e9


def reset_peak(device: torch.device) -> None:
    """Let peaks count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    from rcpo.models.evaluation import peak_memory_gb

    return int(peak_memory_gb(device) * 1e9)
