"""The ZeRO stage of a run that leaves it to rcpo: by model, pairs and the GPUs' memory.

Decided once, before the config is frozen, so that a resumed run has the stage of its checkpoints. The budget
is that of `rcpo.engine.memory`. Called by `rcpo.launch.start`.
"""

import dataclasses
import logging

import torch

from rcpo.config.resolved import ResolvedConfig
from rcpo.data.inputs import Inputs
from rcpo.engine.memory import fitting_stage, in_words, memory_budget
from rcpo.models.checks import shapes_of

logger = logging.getLogger(__name__)


def with_stage(config: ResolvedConfig, inputs: Inputs) -> ResolvedConfig:
    """`config` with a ZeRO stage; a stage that was given stays."""
    if config.deepspeed.stage is not None:
        return config
    model = shapes_of(config.model)
    num_rows, width = 2 * config.train.pairs_per_device * inputs.train.slots, max(inputs.train.widths())
    stage = fitting_stage(config, model, num_rows, width, smallest_memory())
    budget = memory_budget(config, model, num_rows, width, stage=stage)
    logger.info("deepspeed.stage=%d of itself; memory of a rank: %s", stage, in_words(budget))
    return dataclasses.replace(config, deepspeed=dataclasses.replace(config.deepspeed, stage=stage))


def smallest_memory() -> int:
    """Bytes of the smallest GPU that this process sees."""
    devices = range(torch.cuda.device_count())
    return min(torch.cuda.get_device_properties(idx).total_memory for idx in devices)
