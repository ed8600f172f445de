"""The largest micro-batch, forward and back, before the first step: memory runs out here and not on the third
day.

Also where policy and reference must agree, unless the reference has weights of its own: both are the initial
weights here. Changes nothing: the gradient
is times zero, and the random numbers are put back. Called by `rcpo.training.loop` on every rank.
"""

import logging

import torch

from rcpo.common.console import RunConsole
from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.inputs import Inputs
from rcpo.data.joint import lay_out
from rcpo.data.sampler import PairSampler
from rcpo.models.engine import Engine
from rcpo.models.evaluation import peak_memory_gb
from rcpo.models.memory import in_words, memory_budget
from rcpo.ranks.distributed import gather, rank, world_size
from rcpo.reference.table import Reference
from rcpo.reference.weights import has_own_weights

logger = logging.getLogger(__name__)

START_TOLERANCE_NATS = 0.05
"""Largest |z - ref| in fp32 that padding and summation order explain; bf16 gets 20 times as much."""


def rehearse(
    config: ResolvedConfig,
    inputs: Inputs,
    engine: Engine,
    sampler: PairSampler,
    num_steps: int,
    reference: Reference,
) -> None:
    """Print the memory budget, run the largest micro-batch on every rank, and warn where z and ref differ.
    Collective; `engine` has its initial weights.

    Raises UserError when the micro-batch does not fit.
    """
    indices = largest_micro_batch(config, inputs, sampler, num_steps)
    pairs = [inputs.train[idx] for idx in indices]
    batch = lay_out(config.train, pairs, inputs.pad_id, may_join=True)
    num_rows, num_columns = batch.input_ids.shape
    budget = memory_budget(config, engine.policy.model, num_rows, num_columns, reference.num_bytes)
    if rank() == 0:
        RunConsole().print(
            f"memory of a rank: {in_words(budget)}", style="dim", soft_wrap=True, highlight=False
        )
    devices = [engine.device] if engine.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            z = engine.logprobs(batch.to(engine.device))
            engine.backward((z * 0).sum(), is_last=False)
        ref = torch.cat(reference.rows(indices, batch)[:2]).to(engine.device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        raise UserError(
            f"train.pairs_per_device={config.train.pairs_per_device}: the largest micro-batch, {num_rows} "
            f"rows of {num_columns} tokens, does not fit into memory ({in_words(budget)}); type "
            "train.pairs_per_device=1, model.gradient_checkpointing=true, a smaller train.max_length, or a "
            f"higher deepspeed.stage{', or reference=cached' if reference.num_bytes else ''}"
        ) from None
    largest = max(gather(float((z.detach() - ref).abs().max())))
    if has_own_weights(config):
        logger.info("policy and reference differ by up to %.3f nats before the first update", largest)
    else:
        _warn_of_difference(config, largest)
    logger.info(
        "the largest micro-batch, %d rows of %d tokens, ran; peak memory %.2f GB; budget: %s",
        num_rows, num_columns, peak_memory_gb(engine.device), in_words(budget),
    )  # fmt: skip


def largest_micro_batch(
    config: ResolvedConfig, inputs: Inputs, sampler: PairSampler, num_steps: int
) -> list[int]:
    """Of the first pass over the pairs, on any rank, the micro-batch that takes most token slots.

    Padded rows: no micro-batch of the whole run is larger, since one with the widest pair is among them.
    Where rows are joined (train.share_prefix, train.packing), a later pass may put longer pairs together.
    Takes time in proportion to the pairs, however long the run is.
    """
    train = config.train
    lengths = inputs.train.arrays.lengths
    joined = lengths.sum(axis=1).tolist() if train.share_prefix or train.packing else []
    widths = inputs.train.widths()

    def slots(indices: list[int]) -> int:
        if train.packing:
            return sum(joined[idx] for idx in indices)
        of_pair = joined if train.share_prefix else widths
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


def _warn_of_difference(config: ResolvedConfig, largest: float) -> None:
    tolerance = START_TOLERANCE_NATS * (20 if config.model.dtype == "bfloat16" else 1)
    if not largest <= tolerance:  # a nan is no agreement either
        logger.warning(
            "policy and reference differ by up to %.3f nats before the first update (tolerance %.2f): "
            "the pairs are not those that the reference was computed for (data, chat template or tokenizer "
            "have changed), or its weights are others, or the dtype, the attention kernel, or dropout "
            "(model.lora.dropout, or in the model's config)",
            largest, tolerance,
        )  # fmt: skip
