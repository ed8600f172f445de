"""What the coming step works on: this rank's micro-batches, laid out, with the reference's rows.

Owns which pairs of the sampler become which `MicroBatch`. Called by `rcpo.training.loop` before every step.
"""

from collections.abc import Sequence

import torch

from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import PairBatch
from rcpo.data.inputs import Inputs
from rcpo.data.joint import lay_out
from rcpo.data.pairs import TokenizedPair
from rcpo.data.sampler import PairSampler, dealt
from rcpo.method.calibrators import Calibrator
from rcpo.ranks.distributed import rank, world_size
from rcpo.ranks.transfer import to_device
from rcpo.reference.visits import Visit
from rcpo.training.by_sign import with_lists
from rcpo.training.measurement import Measurement
from rcpo.training.measurements import kind_at
from rcpo.training.micro_batch import MicroBatch, made_for
from rcpo.training.state import Training


def num_tokens_of(inputs: Inputs, indices: list[int]) -> int:
    """Tokens of these training pairs, both sides, prompt and response, without padding."""
    return sum(side.num_tokens for idx in indices for side in inputs.train[idx].sides)


def first_pass(
    config: ResolvedConfig, sampler: PairSampler, num_steps: int, calibrator: Calibrator
) -> list[Visit]:
    """The micro-batches of the first pass over the pairs, of all ranks, in bf16, where z depends on them."""
    if config.model.dtype != "bfloat16":
        return []
    visits = []
    for step in range(min(num_steps, sampler.steps_of(1))):
        kind = kind_at(config, calibrator, step)
        visits += [
            Visit(indices, kind.takes_joint_layouts, kind.takes_sides_apart)
            for indices in sampler.micro_batches(step, 0, 1, config.train.pairs_per_device)
        ]
    return visits


def micro_batches_of(training: Training, measurement: Measurement) -> list[MicroBatch]:
    """This rank's micro-batches of the coming step, on the device."""
    apart = measurement.takes_sides_apart and training.config.model.dtype == "bfloat16"
    config, device = training.config, training.engine.device
    cut = training.sampler.micro_batches(
        training.state.step, rank(), world_size(), config.train.pairs_per_device
    )

    def lay(pairs: Sequence[TokenizedPair]) -> PairBatch:
        return lay_out(config.train, pairs, training.inputs.pad_id, measurement.takes_joint_layouts)

    micro_batches = []
    for indices in cut:
        pairs = [training.inputs.train[idx] for idx in indices]
        batch = lay(pairs)
        rows = training.reference.rows(indices, batch, apart)
        read = None if training.moving is None else training.moving.rows(indices, batch, apart)
        made = made_for(training.method.objective, pairs, batch, rows, training.inputs.pad_id, read)
        made = made.to(device)
        if pairs[0].scores is not None:
            made = with_lists(made, pairs, training.inputs.train.slots, lay)
        micro_batches.append(made)
    return micro_batches


def mismatched_of(training: Training) -> list[MicroBatch]:
    """This rank's mismatched pairs of the coming step, on the device, in as many micro-batches of as many
    pairs."""
    config, inputs, device = training.config, training.inputs, training.engine.device
    mismatches = training.sampler.mismatches(training.state.step)
    widths = inputs.mismatched(mismatches, config).widths()
    micro_batches = []
    for which in dealt(mismatches, widths, rank(), world_size(), config.train.pairs_per_device):
        batch = lay_out(config.train, inputs.mismatched(which, config), inputs.pad_id, may_join=True)
        ref_w, ref_l = training.read_reference.mismatched_rows(which, batch)
        ref_w, ref_l = to_device(ref_w, device), to_device(ref_l, device)
        micro_batches.append(MicroBatch(batch.to(device), ref_w, ref_l, torch.ones_like(ref_w)))
    return micro_batches
