"""The learning rate over a run: transformers' schedules under rcpo's keys.

Does not know DeepSpeed: `rcpo.engine.engine` steps what is made here."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from rcpo.common.errors import UserError
from rcpo.config.optim import OptimConfig


def num_warmup_steps(config: OptimConfig, num_steps: int) -> int:
    """Of a run of `num_steps`; a share is rounded up, as in transformers."""
    if config.warmup_ratio is None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * num_steps)


def build_schedule(config: OptimConfig, optimizer: Optimizer, num_steps: int) -> LambdaLR:
    """What gives each of `num_steps` optimizer steps its learning rate.

    constant: the peak. linear: to 0 at the end. cosine: half a wave down to `floor` times the peak. wsd: the
    peak until the last `decay_ratio` of all steps, then half a wave to `floor` times the peak; its warm-up
    begins at the floor, that of the others at 0. Raises UserError where warm-up and decay of wsd do not fit
    into the run.
    """
    warmup = num_warmup_steps(config, num_steps)
    name: str = config.schedule
    extra: dict[str, float] = {}
    if config.schedule == "constant":
        name = "constant_with_warmup"
    elif config.schedule == "wsd":
        decay = math.ceil(config.decay_ratio * num_steps)
        if warmup + decay > num_steps:
            raise UserError(
                f"optim.decay_ratio={config.decay_ratio}: {decay} steps of decay after {warmup} of warm-up "
                f"are more than the run's {num_steps}; type optim.decay_ratio="
                f"{math.floor(100 * max(0, num_steps - warmup) / num_steps) / 100}"
            )
        name, extra = "warmup_stable_decay", {"num_decay_steps": decay, "min_lr_ratio": config.floor}
    elif config.floor > 0:
        name, extra = "cosine_with_min_lr", {"min_lr_rate": config.floor}
    made: LambdaLR = get_scheduler(name, optimizer, warmup, num_steps, scheduler_specific_kwargs=extra)
    return made
