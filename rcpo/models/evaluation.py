"""Log-probabilities of many pairs without gradients: every evaluation, and the batches of a reference pass.

Pairs are spread over the ranks in batches of similar length; the order of the result is that of the input.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import PairBatch, collate, width
from rcpo.data.pairs import SideLogProbs
from rcpo.data.tokenize import TokenizedPair
from rcpo.ranks.distributed import gather, rank, sum_over_ranks, world_size


class LogProbModel(Protocol):
    """What gives log-probabilities without gradients: the engine of a policy, or a reference model."""

    @property
    def device(self) -> torch.device: ...

    def logprobs_without_grad(self, batch: PairBatch, tokens: bool = False) -> Tensor:
        """z (2B,) fp32; with `tokens` the token log-probs (N,). Collective at ZeRO 3."""


def eval_batch(config: ResolvedConfig) -> int:
    """Pairs of one forward pass without gradients: four micro-batches' worth take less memory than one step
    does."""
    return max(4, 4 * config.train.pairs_per_device)


def batches_by_length(pairs: Sequence[TokenizedPair], pairs_per_device: int) -> list[list[int]]:
    """Indices of the pairs, those of similar length together."""
    by_length = sorted(range(len(pairs)), key=lambda idx: width(pairs[idx]))
    return [by_length[start : start + pairs_per_device] for start in range(0, len(pairs), pairs_per_device)]


def evaluate_logprobs(
    model: LogProbModel, pairs: Sequence[TokenizedPair], pad_id: int, pairs_per_device: int
) -> SideLogProbs:
    """z_w, z_l of `pairs` under the current weights of `model`; the same on every rank. Collective.

    Every rank runs the same number of forward passes, because at ZeRO 3 a forward pass is itself a
    collective: where batches do not divide by the ranks, the last ones are computed twice and one copy is
    thrown away.
    """
    batches = batches_by_length(pairs, pairs_per_device)
    result = torch.zeros(2, len(pairs), dtype=torch.float32, device=model.device)
    for first in range(0, len(batches), world_size()):
        mine = first + rank()
        members = batches[min(mine, len(batches) - 1)]
        z = model.logprobs_without_grad(collate([pairs[idx] for idx in members], pad_id).to(model.device))
        if mine < len(batches):
            result[:, members] = z.view(2, len(members))
    z_w, z_l = sum_over_ranks(result).cpu()
    return SideLogProbs(z_w, z_l)


def evaluate_token_logprobs(
    model: LogProbModel, pairs: Sequence[TokenizedPair], pad_id: int, pairs_per_device: int
) -> list[Tensor]:
    """Per pair the token log-probs of the chosen and then the rejected response, (|y_w| + |y_l|,) fp32 on the
    CPU; the same on every rank. Collective."""
    found: dict[int, Tensor] = {}
    batches = [
        range(start, min(start + pairs_per_device, len(pairs)))
        for start in range(0, len(pairs), pairs_per_device)
    ]
    for first in range(0, len(batches), world_size()):
        members = batches[min(first + rank(), len(batches) - 1)]
        batch = collate([pairs[idx] for idx in members], pad_id).to(model.device)
        token_logps = model.logprobs_without_grad(batch, tokens=True).cpu()
        sides = token_logps.split(batch.lengths.tolist())
        for place, idx in enumerate(members):
            found[idx] = torch.cat([sides[place], sides[place + len(members)]])
    for others in gather(found):
        found |= others
    return [found[idx] for idx in range(len(pairs))]


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far: of the GPU where there is one, else of this process. GB of 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.is_file():  # the system's own count starts at what the process that started this one held
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), flags=re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024 / 1e9
    import resource

    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
