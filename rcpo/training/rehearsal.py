"""The largest micro-batch, forward and back, before the first step: memory runs out here and not on the third
day.

With all that a step finds there: AdamW's moments, the buffers of calibration, and the layout of a measured
step where it is another. Also where policy and reference must agree, unless the reference has weights of its
own: both are the initial weights here. Changes nothing: the pairs weigh nothing, so the gradient is zero, and
the random numbers are put back. Called by `rcpo.training.loop` on every rank.
"""

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rcpo.common.console import RunConsole
from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.inputs import Inputs
from rcpo.data.joint import lay_out
from rcpo.data.sampler import PairSampler
from rcpo.engine.memory import in_words, memory_budget, update_bytes
from rcpo.models.evaluation import peak_memory_gb
from rcpo.models.load import is_out_of_memory
from rcpo.ranks.distributed import gather, rank, world_size
from rcpo.reference.table import Reference
from rcpo.reference.weights import has_own_weights
from rcpo.training.measurement import Measurement
from rcpo.training.measurements import Measurements
from rcpo.training.micro_batch import MicroBatch, beside
from rcpo.training.state import Method, TrainState
from rcpo.training.step import backward_apart, backward_together

logger = logging.getLogger(__name__)

START_TOLERANCE_NATS = {"float32": 0.005, "bfloat16": 0.2}
"""Largest |z - ref| / sqrt(tokens) that padding and summation order explain, token by token
independently. SmolLM2-135M in bf16 was off by 0.044 on average."""


def rehearse(
    config: ResolvedConfig,
    inputs: Inputs,
    method: Method,
    sampler: PairSampler,
    num_steps: int,
    reference: Reference,
    measurements: Measurements,
    state: TrainState,
    reference_bytes: int,
) -> None:
    """Print the memory budget with `reference_bytes` of models beside the policy, run the largest micro-batch
    on every rank, and warn where z and ref differ. Collective; the engine has its initial weights, `state` is
    that before the first step.

    Raises UserError when the micro-batch does not fit.
    """
    engine = method.engine
    state = dataclasses.replace(state, calibrator=copy.deepcopy(state.calibrator))
    differences: list[Tensor] = []
    tolerances: list[Tensor] = []
    for measurement in _kinds(config, measurements, state):
        may_join = measurement.takes_joint_layouts
        indices = largest_micro_batch(config, inputs, sampler, num_steps, may_join)
        pairs = [inputs.train[idx] for idx in indices]
        batch = lay_out(config.train, pairs, inputs.pad_id, may_join=may_join)
        likely = beside(method.objective, pairs, inputs.pad_id)
        num_rows, num_columns = batch.input_ids.shape
        budget = memory_budget(config, engine.policy.model, num_rows, num_columns, reference_bytes)
        if rank() == 0 and not differences:
            line = f"memory of a rank: {in_words(budget)}"
            RunConsole().print(line, style="dim", soft_wrap=True, highlight=False)
        fault = (
            f"train.pairs_per_device={config.train.pairs_per_device}: the largest micro-batch, {num_rows} "
            f"rows of {num_columns} tokens, does not fit into memory ({in_words(budget)}); type "
            "train.pairs_per_device=1, model.gradient_checkpointing=true, a smaller train.max_length, or a "
            f"higher deepspeed.stage{', or reference=cached' if reference.num_bytes else ''}"
        )
        with told_when_full(fault):
            engine.make_moments()
            made = MicroBatch(batch, *_nothing(len(indices)), likely=likely)
            z = _forward_and_back(method, state, measurement, made)
            ref = torch.cat(reference.rows(indices, batch)[:2]).to(engine.device)
            room = update_bytes(config, engine.policy.model, engine.stage)
            torch.empty(room, dtype=torch.uint8, device=engine.device)  # given back at once
        differences.append((z - ref).abs().cpu())
        tolerances.append(START_TOLERANCE_NATS[config.model.dtype] * batch.lengths.sqrt())
    apart, tolerance = torch.cat(differences), torch.cat(tolerances)
    is_near = bool((apart <= tolerance).all())  # a nan is no agreement either
    largest, all_near = max(gather(float(apart.max()))), all(gather(is_near))
    if has_own_weights(config) or all_near:
        logger.info("policy and reference differ by up to %.3g nats before the first update", largest)
    else:
        _warn_of_difference(largest, float(tolerance.max()))
    logger.info(
        "the largest micro-batch, %d rows of %d tokens, ran; peak memory %.2f GB; budget: %s",
        num_rows, num_columns, peak_memory_gb(engine.device), in_words(budget),
    )  # fmt: skip


@contextlib.contextmanager
def told_when_full(fault: str) -> Iterator[None]:
    """Raise UserError with the line `fault` where memory runs out inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(fault) from None


def _kinds(config: ResolvedConfig, measurements: Measurements, state: TrainState) -> Sequence[Measurement]:
    """The kinds of steps whose memory differs, their buffers made: one, where the measured step is an
    ordinary one that catches more on its way."""
    measured = measurements.at(0, state.calibrator)
    is_joint = config.train.share_prefix or config.train.packing
    if measured.has_passes_beside:  # of one side at a time: smaller than the ordinary pass
        return (Measurement(),)
    is_other = measured.takes_sides_apart or (is_joint and not measured.takes_joint_layouts)
    return (Measurement(), measured) if is_other else (measured,)


def _nothing(num_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reference log-probs and weights of pairs that pull nowhere, whatever the reference has."""
    return torch.zeros(num_pairs), torch.zeros(num_pairs), torch.zeros(num_pairs)


def _forward_and_back(
    method: Method, state: TrainState, measurement: Measurement, micro_batch: MicroBatch
) -> Tensor:
    """One micro-batch as `rcpo.training.step` runs it, without an end; z (2B,). Collective."""
    engine = method.engine
    micro_batch = micro_batch.to(engine.device)
    backward = backward_apart if measurement.takes_sides_apart else backward_together
    devices = [engine.device] if engine.device.type == "cuda" else []
    state.calibrator.begin()
    measurement.begin()
    for _ in range(min(2, engine.accumulation_steps)):  # the second finds the gradient of the first
        with torch.random.fork_rng(devices=devices), engine.rehearsing():
            priced = backward(method, state, micro_batch, measurement)
    return torch.cat([priced.plain.z_w, priced.plain.z_l])


def largest_micro_batch(
    config: ResolvedConfig, inputs: Inputs, sampler: PairSampler, num_steps: int, may_join: bool = True
) -> list[int]:
    """Of the first pass over the pairs, on any rank, the micro-batch that takes most token slots; with
    `may_join` as train.share_prefix and train.packing lay it out.

    Padded rows: no micro-batch of the whole run is larger, since one with the widest pair is among them.
    Where rows are joined (train.share_prefix, train.packing), a later pass may put longer pairs together.
    Takes time in proportion to the pairs, however long the run is.
    """
    train = config.train
    packing, share_prefix = may_join and train.packing, may_join and train.share_prefix
    lengths = inputs.train.arrays.lengths
    joined = lengths.sum(axis=1).tolist() if share_prefix or packing else []
    widths = inputs.train.widths()

    def slots(indices: list[int]) -> int:
        if packing:
            return sum(joined[idx] for idx in indices)
        of_pair = joined if share_prefix else widths
        return len(indices) * max(of_pair[idx] for idx in indices)

    return max(
        (
            indices
            for step in range(min(num_steps, sampler.steps_of(1)))
            for of_rank in range(world_size())
            for indices in sampler.micro_batches(step, of_rank, world_size(), train.pairs_per_device)
        ),
        key=slots,
    )


def _warn_of_difference(largest: float, tolerance: float) -> None:
    logger.warning(
        "policy and reference differ by up to %.3f nats before the first update (tolerance %.2f): "
        "the pairs are not those that the reference was computed for (data, chat template or tokenizer "
        "have changed), or its weights are others, or the dtype, the attention kernel, or dropout "
        "(model.lora.dropout, or in the model's config)",
        largest, tolerance,
    )  # fmt: skip
