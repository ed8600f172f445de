"""How torchrun and srun tell a process that it is one of several ranks, in the five variables that torch and
DeepSpeed read. Functions of an environment alone; imports no torch.

LOCAL_RANK is the index of this rank's GPU among those that it sees, which is how DeepSpeed and transformers
read it; a launcher that lets each rank see its own GPU alone counts the ranks of a node all the same.
"""

import os
from collections.abc import Callable, Mapping

from rcpo.common.errors import UserError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, NUM_JOBS, PORTS_OF_JOB = 20000, 1500, 8
"""Ports below those that the kernel gives to anyone: eight for each of so many consecutive SLURM jobs."""


def joined_world_size(env: Mapping[str, str] = os.environ) -> int | None:
    """Number of ranks when torchrun or srun has started this process among others, else None."""
    if _is_named(env):
        return int(env["WORLD_SIZE"])
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return int(env["SLURM_STEP_NUM_TASKS"])
    return None


def is_first_rank(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0, or alone."""
    if _is_named(env):
        return env["RANK"] == "0"
    return joined_world_size(env) is None or env["SLURM_PROCID"] == "0"


def rank_variables(
    env: Mapping[str, str], num_gpus: int, address_of_first: Callable[[str], str]
) -> dict[str, str] | None:
    """The five variables of a process that torchrun or srun started among others, None for one that is alone.

    `num_gpus` are visible to it, 0 for a rank on a CPU. `address_of_first` gives the address of the first of
    SLURM's list of nodes. Two steps of one SLURM job meet at two ports; slurm/array.sbatch looks for a free
    one and sets it. Raises UserError where the GPUs that a rank sees leave open which is its own.
    """
    if _is_named(env):
        own = {name: env[name] for name in RANK_VARIABLES}
    elif joined_world_size(env) is not None:
        port = int(env["SLURM_JOB_ID"]) % NUM_JOBS * PORTS_OF_JOB + int(env["SLURM_STEP_ID"]) % PORTS_OF_JOB
        own = {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "MASTER_ADDR": env.get("MASTER_ADDR") or address_of_first(env["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": env.get("MASTER_PORT") or str(FIRST_PORT + port),
        }
    else:
        return None
    return own | {"LOCAL_RANK": str(_own_gpu(int(own["LOCAL_RANK"]), num_gpus))}


def _is_named(env: Mapping[str, str]) -> bool:
    return all(name in env for name in RANK_VARIABLES)


def _own_gpu(number: int, num_gpus: int) -> int:
    """Index of the GPU of the rank that is `number` on its node, among the `num_gpus` that it sees."""
    if num_gpus == 1:
        return 0
    if num_gpus and number >= num_gpus:
        raise UserError(
            f"LOCAL_RANK={number}: the rank of this number on its node sees {num_gpus} GPUs; let it see one "
            "(srun --gpus-per-task=1) or all that the ranks of its node use (srun --gpu-bind=none)"
        )
    return number
