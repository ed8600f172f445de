"""The method without DeepSpeed: `train_step` over a plain torch optimizer, in this process.

`SmallEngine` has the verbs of `rcpo.engine.engine.Engine` that a step uses, for one rank at ZeRO 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import PairBatch, collate
from rcpo.data.mismatched import Mismatch, MismatchedPairs
from rcpo.data.packer import pack
from rcpo.data.tokenize import TokenizedPair
from rcpo.engine.gradient_norm import group_norms
from rcpo.engine.optimizer import build_optimizer
from rcpo.method.calibrators import build_calibrator
from rcpo.models.policy import Policy
from rcpo.reference.table import ReferenceRows
from rcpo.training.aggregate import aggregate_of
from rcpo.training.by_sign import slots_of_step, with_lists
from rcpo.training.measurements import Measurements
from rcpo.training.micro_batch import MicroBatch, made_for
from rcpo.training.state import Method, TrainState
from rcpo.training.step import train_step


class SmallEngine:
    """A policy, a torch optimizer and the number of micro-batches whose mean is a step's gradient."""

    stage = 0
    device = torch.device("cpu")

    def __init__(self, model: PreTrainedModel, config: ResolvedConfig, num_micro_batches: int) -> None:
        self.policy = Policy(model).train()
        self.vocabulary, self.hidden_size = model.get_output_embeddings().weight.shape
        self._num_micro_batches = num_micro_batches
        self._optimizer = build_optimizer(config.optim, self.trainable_parameters())
        self._grad_clip = config.train.grad_clip

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def logprobs(self, batch: PairBatch) -> Tensor:
        z: Tensor = self.policy(batch)
        return z

    @torch.no_grad()
    def logprobs_without_grad(self, batch: PairBatch, tokens: bool = False) -> Tensor:
        self.policy.eval()
        z: Tensor = self.policy(batch, tokens)
        self.policy.train()
        return z

    @torch.no_grad()
    def expert_sums(self, batch: PairBatch) -> Tensor:
        self.policy.eval()
        sums: Tensor = self.policy(batch, experts=True)
        self.policy.train()
        return sums

    def backward(self, loss: Tensor, is_last: bool = True) -> None:
        (loss / self._num_micro_batches).backward()

    def gradient_norms(self) -> Tensor:
        return group_norms(self._optimizer, self.trainable_parameters())

    def end_micro_batch(self) -> None:
        """Nothing to tell to anyone."""

    def lr_share(self) -> float:
        return 1.0

    def step(self, gradient_norms: Sequence[float]) -> None:
        if self._grad_clip:
            torch.nn.utils.clip_grad_norm_(self.trainable_parameters(), self._grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()


def train_small(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    config: ResolvedConfig,
    num_steps: int,
    split: Sequence[int],
    reference: SmallEngine | None = None,
    slots: int = 1,
) -> list[dict[str, float]]:
    """Train `model` in place against `reference`, or what it was, each step on all of `pairs`, cut into
    micro-batches of equal `split`; returns the metrics rows. A pair meets the responses of the one after it,
    where the objective needs mismatched pairs. With `slots` pairs are those of lists, and `split` counts
    lists."""
    engine = SmallEngine(model, config, len(split))
    frozen = reference or engine
    objective = config.objective_function
    measurements = Measurements(config, engine, slots_of_step(slots))  # type: ignore[arg-type]
    state = TrainState(0, build_calibrator(config.calibration), objective.initial_state(8.0))
    in_step = slots_of_step(slots)
    method = Method(
        engine,  # type: ignore[arg-type]
        objective,
        aggregate_of(config.composition),
        len(pairs) // slots * in_step,
        in_step,
        config.model.router_loss,
        config.composition.weight_of == "batch",
    )
    which = [Mismatch(idx, (idx + 1) % len(pairs)) for idx in range(len(pairs))]
    mismatched = MismatchedPairs(pack(pairs), which, config.train.max_length)
    made: list[list[MicroBatch]] = []
    for all_pairs in (pairs, mismatched if objective.needs_mismatched else []):
        made.append([])
        start = 0
        for num in split if all_pairs else ():
            size = num * slots
            part = all_pairs[start : start + size]
            batch = collate(part, 0)
            ref_w, ref_l = frozen.logprobs_without_grad(batch).chunk(2)
            if all_pairs is pairs:
                tokens = None
                if objective.needs_reference_tokens:
                    tokens = frozen.logprobs_without_grad(batch, tokens=True)
                made[-1].append(made_for(objective, part, batch, ReferenceRows(ref_w, ref_l, tokens), 0))
            else:
                made[-1].append(MicroBatch(batch, ref_w, ref_l, torch.ones(size)))
            if part[0].scores is not None:
                made[-1][-1] = with_lists(made[-1][-1], part, slots, lambda each: collate(each, 0))
            start += size
    rows = []
    for step in range(num_steps):
        measurement = measurements.at(step, state.calibrator)
        trained = train_step(method, state, made[0], measurement, mismatched=made[1])
        rows.append({"step": step + 1} | trained.row)
    return rows
