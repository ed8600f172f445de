"""A reference that follows the policy: TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656).

After every reference.sync_every optimizer steps its weights become (1 - mix) times themselves plus mix times
the policy's, or an average of the policy's (`rcpo.reference.bema`). It is what the loss reads; displacement
is still measured against the reference of the start, which stays where it is (`rcpo.reference.maker`). Held
as a frozen model beside the policy, since no cache can have the log-probs of weights that a run makes as it
goes. Owns the mixing, and what a checkpoint keeps of it. Called by `rcpo.training.loop`.
"""

import contextlib
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
from rcpo.reference.bema import Bema
from rcpo.reference.live import FrozenModel
from rcpo.reference.maker import LiveReference

EMA = "bema.ema."
"""In front of a parameter's name in a checkpoint."""


class MovingReference(LiveReference):
    """As `rcpo.reference.table.Reference` says, under its weights of the moment."""

    def __init__(self, config: ResolvedConfig, inputs: Inputs, engine: Engine) -> None:
        """With the weights of the start. Collective."""
        self._engine, self._frozen = engine, FrozenModel(config, engine.device)
        self._every, self._mix = config.reference.sync_every, config.reference.sync_mix
        tokens = config.objective_function.needs_reference_tokens
        super().__init__(self._frozen, inputs, config, tokens)
        self._bema: Bema | None = None
        if config.reference.sync_how == "bema":
            reference = config.reference
            self._bema = Bema(reference.bema_power, reference.bema_bias, reference.bema_lag)
            for name, own in self._frozen.named_parameters():
                with self._whole([own], changes=False):
                    if self._holds_whole:
                        self._bema.begin(name, own.data)
            if engine.device.type == "cpu":
                self.num_bytes += self._bema.num_bytes

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Take in the policy, where optimizer step `step` (counted from 1) is one of those. Collective."""
        if step % self._every:
            return
        named = self._frozen.named_parameters()
        for (name, own), its in zip(named, self._engine.policy.parameters(), strict=True):
            with self._whole([its], changes=False), self._whole([own], changes=True):
                if not self._holds_whole:
                    continue
                if self._bema is not None:
                    own.data.copy_(self._bema.take(name, its.data, step))
                else:
                    own.data.copy_(torch.lerp(own.data.float(), its.data.float(), self._mix))

    def state(self) -> dict[str, Tensor]:
        """All its weights, whole, on the CPU of rank 0, and its running averages; empty on other ranks.
        Collective."""
        weights = {}
        for name, own in self._frozen.named_parameters():
            with self._whole([own], changes=False):
                if rank() == 0:
                    weights[name] = own.detach().to("cpu", copy=True)
                    if self._bema is not None:
                        weights[f"{EMA}{name}"] = self._bema.ema[name]
        return weights

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take back what `state` gave, on any number of ranks and at any stage. Collective."""
        weights = load_file(path)
        for name, own in self._frozen.named_parameters():
            with self._whole([own], changes=True):
                if self._holds_whole:
                    own.data.copy_(weights[name])
                    if self._bema is not None:
                        self._bema.ema[name].copy_(weights[f"{EMA}{name}"])

    @property
    def _is_sharded(self) -> bool:
        return self._engine.stage == 3

    @property
    def _holds_whole(self) -> bool:
        """Whether weights that are whole are this rank's to change."""
        return not self._is_sharded or rank() == 0

    def _whole(self, parameters: list[nn.Parameter], changes: bool) -> Any:
        """Open while they are whole on every rank; what rank 0 changes then holds for all."""
        if not self._is_sharded:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if changes else None)
