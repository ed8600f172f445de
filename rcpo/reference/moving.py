"""A reference that follows the policy: TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656).

After every reference.sync_every optimizer steps its weights become (1 - mix) times themselves plus mix times
the policy's. It is what the loss reads; displacement is still measured against the reference of the start,
which stays where it is (`rcpo.reference.maker`). Held as a frozen model beside the policy, since no cache can
have the log-probs of weights that a run makes as it goes. Owns the mixing, and what a checkpoint keeps of it.
Called by `rcpo.training.loop`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rcpo.config.resolved import ResolvedConfig
from rcpo.data.inputs import Inputs
from rcpo.engine.engine import Engine
from rcpo.ranks.distributed import rank
from rcpo.reference.live import FrozenModel
from rcpo.reference.maker import LiveReference


class MovingReference(LiveReference):
    """As `rcpo.reference.table.Reference` says, under its weights of the moment."""

    def __init__(self, config: ResolvedConfig, inputs: Inputs, engine: Engine) -> None:
        """With the weights of the start. Collective."""
        self._engine, self._frozen = engine, FrozenModel(config, engine.device)
        self._every, self._mix = config.reference.sync_every, config.reference.sync_mix
        tokens = config.objective_function.needs_reference_tokens
        super().__init__(self._frozen, inputs, config, tokens)

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Take in the policy, where optimizer step `step` (counted from 1) is one of those. Collective."""
        if step % self._every:
            return
        for own, its in zip(self._parameters(), self._engine.policy.parameters(), strict=True):
            with self._whole([its], changes=False), self._whole([own], changes=True):
                if not self._is_sharded or rank() == 0:
                    mixed = torch.lerp(own.data.float(), its.data.float(), self._mix)
                    own.data.copy_(mixed)

    def state(self) -> dict[str, Tensor]:
        """All its weights, whole, on the CPU of rank 0; empty on other ranks. Collective."""
        weights = {}
        for name, own in self._frozen.named_parameters():
            with self._whole([own], changes=False):
                if rank() == 0:
                    weights[name] = own.detach().to("cpu", copy=True)
        return weights

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take back what `state` gave, on any number of ranks and at any stage. Collective."""
        weights = load_file(path)
        for name, own in self._frozen.named_parameters():
            with self._whole([own], changes=True):
                if not self._is_sharded or rank() == 0:
                    own.data.copy_(weights[name])

    @property
    def _is_sharded(self) -> bool:
        return self._engine.stage == 3

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self._frozen.named_parameters())

    def _whole(self, parameters: list[nn.Parameter], changes: bool) -> Any:
        """Open while they are whole on every rank; what rank 0 changes then holds for all."""
        if not self._is_sharded:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if changes else None)
