"""The models that give reference log-probabilities: a frozen one, or the policy with its new adapter off.

Owns how they are held beside the policy. Which weights they have is in `rcpo.reference.weights`; numbers are
kept by `rcpo.reference.cache`. Called by `rcpo.reference.maker`.
"""

import contextlib
import gc
import io
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig

from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import PairBatch
from rcpo.engine.engine import Engine, deepspeed_config
from rcpo.engine.speedups import speed_up
from rcpo.models.adapters import new_adapter_off
from rcpo.models.attention import refuse_joint_layout
from rcpo.models.load import load_frozen_model
from rcpo.models.policy import Policy
from rcpo.ranks.allocator import return_freed_memory
from rcpo.ranks.distributed import world_size
from rcpo.reference.weights import reference_model, without_adapter


class FrozenModel:
    """The reference's weights in memory: whole on every rank, or at ZeRO 3 a shard of them."""

    def __init__(self, config: ResolvedConfig, device: torch.device) -> None:
        """Load them; no random number is drawn. Collective."""
        settings = deepspeed_config(config)
        zero = settings["zero_optimization"]
        zero.pop("offload_optimizer", None)  # there is none
        is_sharded = zero["stage"] == 3
        self.device = device
        self._zero3_marker = HfDeepSpeedConfig(settings) if is_sharded else None
        self._engine: Any = None
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            of_reference = without_adapter(reference_model(config))
            model = load_frozen_model(of_reference)
            speed_up(model, of_reference)
            self._policy: Any = Policy(model if is_sharded else model.to(device))
            self._module: Policy | None = self._policy
            if is_sharded:
                self._engine, *_ = deepspeed.initialize(model=self._policy, config=settings)
                self._policy = self._engine
        if config.train.share_prefix or config.train.packing:
            refuse_joint_layout(model, config.train.share_prefix)
        self._policy.eval()
        sizes = (getattr(one, "ds_numel", one.numel()) * one.element_size() for one in model.parameters())
        self.num_bytes = sum(sizes) // (world_size() if is_sharded else 1)

    @torch.no_grad()
    def logprobs_without_grad(self, batch: PairBatch, tokens: bool = False) -> Tensor:
        """As `rcpo.models.evaluation.LogProbModel` says."""
        z: Tensor = self._policy(batch, tokens)
        return z

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """In the order of a policy's."""
        assert self._module is not None
        return self._module.named_parameters()

    def free(self) -> None:
        """Give the memory back. Numbers one by one: DeepSpeed keeps a list of modules for good."""
        for parameter in self._policy.parameters():
            for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
                if tensor is not None:
                    tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        if self._engine is not None:
            self._engine.destroy()
        self._engine = self._policy = self._module = self._zero3_marker = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            return_freed_memory()


@contextlib.contextmanager
def loaded_when_asked(config: ResolvedConfig, device: torch.device) -> Iterator[Callable[[], FrozenModel]]:
    """A function that loads the frozen model when it is first called; at the end the model is gone."""
    loaded: list[FrozenModel] = []

    def model() -> FrozenModel:
        if not loaded:
            loaded.append(FrozenModel(config, device))
        return loaded[0]

    try:
        yield model
    finally:
        for each in loaded:
            each.free()


class AdapterOff:
    """The reference of a run that trains an adapter: the policy without it. Holds nothing of its own."""

    num_bytes = 0

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.device = engine.device

    def logprobs_without_grad(self, batch: PairBatch, tokens: bool = False) -> Tensor:
        """As `rcpo.models.evaluation.LogProbModel` says."""
        with new_adapter_off(self._engine.policy.model):
            return self._engine.logprobs_without_grad(batch, tokens)
