"""How torchrun and srun tell a process that it is one of several ranks. Imports no torch."""

import os

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def joined_world_size() -> int | None:
    """Number of ranks when torchrun or srun has started this process among others, else None."""
    if all(name in os.environ for name in RANK_VARIABLES):
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    return None
