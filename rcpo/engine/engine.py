"""DeepSpeed behind one thin adapter: the same few verbs at every ZeRO stage, on CPU and on GPUs.

Owns the DeepSpeed config, optimizer and schedule, and what differs between stages (gradient norm, whole
weights, checkpoints). Does not own the loss: `rcpo.training.step` hands it a scalar per micro-batch.
"""

import contextlib
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from rcpo.common.errors import UserError
from rcpo.common.files import FileEntry
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import PairBatch
from rcpo.engine.engine_files import ENGINE_TAG, Writer, convert_to_universal
from rcpo.engine.gradient_norm import group_norms, known, whole_norm
from rcpo.engine.memory import BUCKET
from rcpo.engine.optimizer import build_optimizer, can_be_fused, held_still, make_moments
from rcpo.engine.schedule import build_schedule
from rcpo.engine.speedups import speed_up
from rcpo.models.adapters import exported_tensors
from rcpo.models.attention import refuse_joint_layout
from rcpo.models.load import load_model
from rcpo.models.policy import Policy
from rcpo.models.vision import show_nothing
from rcpo.ranks.distributed import barrier, done_by_rank_zero


def deepspeed_config(config: ResolvedConfig) -> dict[str, Any]:
    """The DeepSpeed config of a resolved run; `deepspeed.extra` wins."""
    stage = config.zero_stage
    train = config.train
    bf16 = config.model.dtype == "bfloat16"
    zero: dict[str, Any] = {"stage": stage}
    if config.deepspeed.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 2 and train.device == "cuda" and config.world_size() > 1:
        zero["overlap_comm"] = True  # as stage 3 does by itself: gradients travel while others are computed
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.pairs_per_device,
        "gradient_accumulation_steps": accumulation_steps(config),
        "gradient_clipping": train.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own would be compiled here
        "zero_force_ds_cpu_optimizer": False,
        # Without a search for what `gradient_norms` has found before: it reads every gradient, and waits.
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "steps_per_print": 10**9,
        # It waits for the device twice a micro-batch; rcpo times whole steps.
        "timers": {"throughput": {"enabled": False}},
    }
    if bf16:
        settings["communication_data_type"] = "fp32"  # else sums of fp32 would travel, and be added, in bf16
        if stage > 0:  # at 0 `Engine` sees to it
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            # Stage 1 would keep all gradients in bf16 too, beside the sums in fp32 that they are added to.
            settings["bf16"]["immediate_grad_update"] = stage == 1
    return _merged(settings, config.deepspeed.extra)


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def accumulation_steps(config: ResolvedConfig) -> int:
    """Micro-batches per rank and optimizer step; `rcpo.config.resolve` has checked that they divide."""
    return config.train.pairs_per_step // (config.world_size() * config.train.pairs_per_device)


FEWEST_GRADIENTS = 5
"""Behind a second moment that is used as a metric. 1/sqrt of a mean of k squared normal numbers has no mean
with k = 1, no variance up to 2 and no fourth moment up to 4: a few coordinates would be all of a product."""


class Engine:
    """A policy under training. Every method that says "collective" must be called by all ranks together."""

    def __init__(
        self, config: ResolvedConfig, num_steps: int, device: torch.device, sees: bool = True
    ) -> None:
        """Load the model and wrap it; `num_steps` fixes the schedule's end, without `sees` no batch has an
        image. Collective."""
        settings = deepspeed_config(config)
        self.stage: int = settings["zero_optimization"]["stage"]
        # Kept alive: with it transformers loads the weights already sharded.
        self._zero3_marker = HfDeepSpeedConfig(settings) if self.stage == 3 else None
        model = load_model(config.model, device)
        speed_up(model, config.model)
        if config.train.share_prefix or config.train.packing:
            refuse_joint_layout(model, config.train.share_prefix)
        self.vocabulary, self.hidden_size = _head_shape(model)
        if self.stage != 3:
            model.to(device)
        if not sees:
            show_nothing(model)
        self.policy = Policy(model)
        self.device = device
        self.accumulation_steps = accumulation_steps(config)
        self._num_micro_batches = 0
        self._is_rehearsal = False
        self.optimizer = config.optim.name
        self._is_adam = self.optimizer == "adamw"
        self._peak_lr = config.optim.lr
        self._num_updates: int | None = None
        """Behind the moments; None: as many as the optimizer says, once it is asked."""
        trained = sum(getattr(one, "ds_numel", one.numel()) for one in self.trainable_parameters())
        # Allocated whole, whatever is to be exchanged: 2 GB by default, for the smallest adapter too.
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET, trained))
        optimizer = build_optimizer(config.optim, self.trainable_parameters(), can_be_fused(config))
        self._optimizer = optimizer
        scheduler = build_schedule(config.optim, optimizer, num_steps)
        # Printed timings; and at stage 0 in bf16 DeepSpeed steps on gradients of zero.
        with contextlib.redirect_stdout(io.StringIO()), held_still(optimizer):
            self._deepspeed, *_ = deepspeed.initialize(
                model=self.policy, optimizer=optimizer, lr_scheduler=scheduler, config=settings
            )
        self._deepspeed.train()
        self._widens_gradients = self.stage == 0 and config.model.dtype == "bfloat16"
        if self._widens_gradients:  # autograd then adds up in fp32; `rcpo.config.resolve` asks for its torch
            for parameter in self.trainable_parameters():
                parameter.grad_dtype = torch.float32
        self._scheduler = scheduler
        self._grad_norm = float("nan")

    def logprobs(self, batch: PairBatch) -> Tensor:
        """z (2B,) fp32, attached to the graph. Collective at stage 3."""
        z: Tensor = self._deepspeed(batch)
        return z

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """In the order of the model, each once."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def second_moments(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[Tensor] | None:
        """Adam's running mean of squared gradients without its bias towards 0, as Adam steps with it: whole
        and fp32, one parameter after the other; None where the optimizer keeps none, or has seen fewer than
        `FEWEST_GRADIENTS`. Collective."""
        if not (self._is_adam and self._optimizer.state):
            return None
        if self._num_updates is None:  # may wait for the device, this once
            self._num_updates = int(next(iter(self._optimizer.state.values()))["step"])
        num_updates = self._num_updates
        if num_updates < FEWEST_GRADIENTS:
            return None
        unbiased = 1 / (1 - self._optimizer.param_groups[0]["betas"][1] ** num_updates)
        if self.stage == 0:
            state = self._optimizer.state
            return (unbiased * state[master]["exp_avg_sq"] for master in self._masters(parameters))
        return (unbiased * safe_get_full_optimizer_state(parameter, "exp_avg_sq") for parameter in parameters)

    def _masters(self, parameters: Sequence[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """What the optimizer steps at stage 0: the parameters, in bf16 their fp32 copies."""
        stepped = self._optimizer.param_groups[0]["params"]
        of = dict(zip(map(id, self.trainable_parameters()), stepped, strict=True))
        return [of[id(parameter)] for parameter in parameters]

    @torch.no_grad()
    def logprobs_without_grad(
        self, batch: PairBatch, tokens: bool = False, own_logits: bool = False
    ) -> Tensor:
        """z (2B,) fp32 in evaluation mode; with `tokens` the token log-probs (N,), with `own_logits` by the
        model's own forward method. Collective at stage 3."""
        self._deepspeed.eval()
        z: Tensor = self._deepspeed(batch, tokens, own_logits)
        self._deepspeed.train()
        return z

    @torch.no_grad()
    def expert_sums(self, batch: PairBatch) -> Tensor:
        """What the router did with the batch's tokens, as `rcpo.models.router` says, in evaluation mode.
        Collective at stage 3."""
        self._deepspeed.eval()
        sums: Tensor = self._deepspeed(batch, experts=True)
        self._deepspeed.train()
        return sums

    @torch.no_grad()
    def logprobs_as_trained(self, batch: PairBatch) -> Tensor:
        """z (2B,) fp32 in training mode, dropout and all. Collective at stage 3."""
        z: Tensor = self._deepspeed(batch)
        return z

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[PreTrainedModel]:
        """While open, the policy is in evaluation mode; gives its model."""
        self._deepspeed.eval()
        try:
            yield self.policy.model
        finally:
            self._deepspeed.train()

    def backward(self, loss: Tensor, is_last: bool = True) -> None:
        """Accumulate a gradient: the mean over micro-batches and ranks is what steps. Collective.

        A micro-batch may have several backward passes, each on a forward pass of its own and, at stage 3, run
        right after it; `is_last` says that no further one follows before `step`.
        """
        is_boundary = is_last and self._ends_step()
        if self._widens_gradients and is_boundary:  # DeepSpeed's own zeros for missing ones are in bf16
            for parameter in self.trainable_parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        self._deepspeed.set_gradient_accumulation_boundary(is_boundary)
        self._deepspeed.backward(loss)

    @contextlib.contextmanager
    def largest_gradient(self) -> Iterator[list[Tensor]]:
        """While open, collects the largest |entry| of each gradient that autograd delivers on this rank:
        scalars on the device, nan or inf where an entry is not finite. Reads every gradient once more."""
        found: list[Tensor] = []

        def look(gradient: Tensor) -> None:
            least, most = torch.aminmax(gradient.detach())  # one pass, where abs() writes a copy; keeps nan
            found.append(torch.maximum(-least, most).float())

        handles = [parameter.register_hook(look) for parameter in self.trainable_parameters()]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def gradient_norms(self) -> Tensor:
        """This rank's share of the norms of the global gradient's parts before clipping, (k,) fp32 on the
        device: summed over ranks they are what `step` wants. Collective, after a step's last `backward`."""
        norms = group_norms(self._deepspeed.optimizer, self.trainable_parameters())
        return norms if self._deepspeed.global_rank == 0 else torch.zeros_like(norms)

    def end_micro_batch(self) -> None:
        """Close a micro-batch that is not its step's last; the last one is closed by `step` or `skip_step`.
        Collective."""
        if not self._ends_step():
            self._deepspeed.step()
            self._num_micro_batches += 1

    def step(self, gradient_norms: Sequence[float]) -> None:
        """Clip the accumulated gradient and update the weights and the schedule; `gradient_norms` has told
        the norms, all of them finite. Collective."""
        if self._num_updates is not None:
            self._num_updates += 1
        with known(self._deepspeed.optimizer, gradient_norms):
            self._deepspeed.step()
        self._num_micro_batches += 1
        self._grad_norm = whole_norm(gradient_norms)

    def skip_step(self) -> None:
        """Throw the accumulated gradient away: weights and optimizer stay, the schedule goes on. Collective.

        DeepSpeed goes through its step, which clears its buffers; the optimizer inside it is held still. At
        stages 1 to 3 DeepSpeed sees the overflow and leaves the schedule, hence the second look.
        """
        num_scheduled = self._scheduler.last_epoch
        with held_still(self._optimizer):
            self._deepspeed.step()
        if self._scheduler.last_epoch == num_scheduled:
            self._scheduler.step()
        self._num_micro_batches += 1
        self._grad_norm = float("nan")

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """While open, no backward pass is a step's last: nothing is exchanged as if an update followed."""
        self._is_rehearsal = True
        try:
            yield
        finally:
            self._is_rehearsal = False

    def make_moments(self) -> None:
        """Let AdamW make its moments now: what a first step lacks memory for is then known before it."""
        make_moments(
            self._optimizer, getattr(self._deepspeed.optimizer, "fp32_partitioned_groups_flat", None)
        )

    def _ends_step(self) -> bool:
        """Whether the current micro-batch is its optimizer step's last."""
        return not self._is_rehearsal and (self._num_micro_batches + 1) % self.accumulation_steps == 0

    def grad_norm(self) -> float:
        """Norm of the global gradient before clipping in the last optimizer step; nan where it was left
        out."""
        return self._grad_norm

    def lr(self) -> float:
        """Learning rate of the coming optimizer step."""
        return float(self._deepspeed.get_lr()[0])

    def lr_share(self) -> float:
        """The same as a part of the peak, optim.lr."""
        return self.lr() / self._peak_lr

    def whole_weights(self) -> dict[str, Tensor] | None:
        """The tensors that are saved (`rcpo.models.adapters.exported_tensors`) on the CPU of rank 0, None on
        other ranks. Collective."""
        is_first = self._deepspeed.global_rank == 0
        weights: dict[str, Tensor] = {}
        for name, parameters, read in exported_tensors(self.policy.model):
            gather: Any = contextlib.nullcontext()
            if self.stage == 3:
                gather = deepspeed.zero.GatheredParameters(parameters)
            with gather:
                if is_first:
                    weights[name] = read().to("cpu", copy=True)
        if not is_first:
            return None
        saved = self.policy.model.state_dict(keep_vars=False)
        for name, buffer in self.policy.model.named_buffers():
            if name in saved:  # persistent ones only
                weights[name] = buffer.detach().to("cpu", copy=True)
        return weights

    def save(self, folder: Path) -> dict[Path, FileEntry]:
        """Write engine, optimizer and schedule under `folder`; of weights those that train. Returns what this
        rank has written. Collective.

        Raises OSError or RuntimeError where this rank could not write, after all ranks are through:
        DeepSpeed's own save has barriers, at which the others would wait for one that has failed.
        """
        kept = self._kept_names()
        writer = Writer(self._deepspeed.checkpoint_engine, kept)
        self._deepspeed.checkpoint_engine = writer
        try:
            self._deepspeed.save_checkpoint(
                str(folder), tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=kept is not None
            )
        finally:
            self._deepspeed.checkpoint_engine = writer.inner
        if writer.fault is not None:
            raise writer.fault
        return writer.written

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on the same number of ranks and the same stage. Collective.

        Raises UserError where it is not of the weights that train here.
        """
        self._deepspeed.load_checkpoint(
            str(folder), tag=ENGINE_TAG, custom_load_fn=None if self._kept_names() is None else self._put_back
        )
        self._link_moments()

    def _kept_names(self) -> set[str] | None:
        """Names of the weights and buffers that a checkpoint holds where others are frozen, None where it is
        the whole model.

        What is frozen comes from model.path again, whose content `rcpo.training.identity` compares: a base of
        16 GB is not written a hundred times, and 4-bit weights have no names that could be loaded.
        """
        parameters = dict(self.policy.named_parameters())
        if all(parameter.requires_grad for parameter in parameters.values()):
            return None
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        buffers = {name for name, _ in self.policy.named_buffers()}
        return trained | (buffers & set(self.policy.state_dict()))

    def _put_back(self, src: dict[str, Tensor], dst: torch.nn.Module) -> None:
        """Load a checkpoint's weights: exactly those of `_kept_names`. DeepSpeed names the arguments."""
        if fault := sorted((self._kept_names() or set()) ^ set(src)):
            where = "in it and not among" if fault[0] in src else "not in it and among"
            raise UserError(
                f"the checkpoint is of another adapter: {fault[0]} is {where} what trains here; resume with "
                "the model.lora and model.path that the run was started with"
            )
        dst.load_state_dict(src, strict=False)

    def _link_moments(self) -> None:
        """Let `second_moments` find what a checkpoint held: DeepSpeed would do so in its first step only.
        Private, hence the pinned version in pyproject.toml."""
        self._num_updates = None
        link = getattr(self._deepspeed.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if self._is_adam and link is not None:
            link()

    def load_converted(self, folder: Path) -> None:
        """Read what `save` wrote on another number of ranks or at another stage; that it can be,
        `rcpo.training.checkpoint` has checked. Collective.

        At stage 0 every rank holds everything; from 1 to 3 DeepSpeed's universal format spreads it anew.
        """
        if self.stage == 0:
            self.load(folder)
            return
        universal = folder.parent / ".universal"
        done_by_rank_zero(lambda: convert_to_universal(folder / ENGINE_TAG, universal / ENGINE_TAG))
        self._deepspeed._config.load_universal_checkpoint = True
        self._deepspeed.load_checkpoint(str(universal), tag=ENGINE_TAG)
        self._deepspeed._config.load_universal_checkpoint = False
        self._link_moments()
        barrier()
        if self._deepspeed.global_rank == 0:
            shutil.rmtree(universal, ignore_errors=True)


def _head_shape(model: PreTrainedModel) -> tuple[int, int]:
    """(V, H) of the output projection, also where ZeRO-3 has already sharded it."""
    weight = model.get_output_embeddings().weight
    vocabulary, hidden = getattr(weight, "ds_shape", weight.shape)
    return int(vocabulary), int(hidden)
