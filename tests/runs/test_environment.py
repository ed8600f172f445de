"""Which rank a process is, by what its launcher put into its environment: one line a launcher."""

from typing import NamedTuple

import pytest

from rcpo.common.errors import UserError
from rcpo.ranks.environment import RANK_VARIABLES, is_first_rank, joined_world_size, rank_variables

JOB = {"SLURM_JOB_ID": "4501", "SLURM_STEP_NODELIST": "gpu[07-08]"}
"""1501 jobs after 3000: the port is 20000 + 8 x 1."""


def torchrun(rank: int, world_size: int, local_rank: int) -> dict[str, str]:
    return dict(
        zip(RANK_VARIABLES, (str(rank), str(world_size), str(local_rank), "n0", "29500"), strict=True)
    )


def srun(rank: int, world_size: int, on_node: int, step: int = 0) -> dict[str, str]:
    return JOB | {
        "SLURM_STEP_ID": str(step), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(on_node),
        "SLURM_STEP_NUM_TASKS": str(world_size),
    }  # fmt: skip


class Case(NamedTuple):
    env: dict[str, str]
    num_gpus: int
    expected: tuple[str, ...] | None
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; None: it is alone."""


CASES = {
    "alone": Case({}, 0, None),
    "alone-with-8-gpus": Case({}, 8, None),
    "a-rank-left-over-from-elsewhere": Case({"RANK": "3", "LOCAL_RANK": "3"}, 8, None),
    "in-a-batch-script": Case({"SLURM_JOB_ID": "4501", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 8, None),
    "srun-of-one-task": Case(srun(0, 1, 0), 8, None),
    "torchrun-of-one": Case(torchrun(0, 1, 0), 1, ("0", "1", "0", "n0", "29500")),
    "torchrun-first": Case(torchrun(0, 8, 0), 8, ("0", "8", "0", "n0", "29500")),
    "torchrun-last": Case(torchrun(7, 8, 7), 8, ("7", "8", "7", "n0", "29500")),
    "torchrun-second-node": Case(torchrun(11, 16, 3), 8, ("11", "16", "3", "n0", "29500")),
    "torchrun-one-gpu-each": Case(torchrun(11, 16, 3), 1, ("11", "16", "0", "n0", "29500")),
    "torchrun-on-cpus": Case(torchrun(3, 4, 3), 0, ("3", "4", "3", "n0", "29500")),
    "torchrun-within-srun": Case(
        srun(1, 2, 0) | torchrun(11, 16, 3), 8, ("11", "16", "3", "n0", "29500")
    ),
    "srun-all-gpus": Case(srun(5, 8, 5), 8, ("5", "8", "5", "at gpu[07-08]", "20008")),
    "srun-one-gpu-each": Case(srun(5, 8, 5), 1, ("5", "8", "0", "at gpu[07-08]", "20008")),
    "srun-all-gpus-second-node": Case(srun(13, 16, 5), 8, ("13", "16", "5", "at gpu[07-08]", "20008")),
    "srun-one-gpu-each-second-node": Case(srun(13, 16, 5), 1, ("13", "16", "0", "at gpu[07-08]", "20008")),
    "srun-one-gpu-a-node": Case(srun(1, 2, 0), 1, ("1", "2", "0", "at gpu[07-08]", "20008")),
    "srun-on-cpus": Case(srun(1, 2, 1), 0, ("1", "2", "1", "at gpu[07-08]", "20008")),
    "srun-second-step-of-the-job": Case(srun(0, 8, 0, step=1), 8, ("0", "8", "0", "at gpu[07-08]", "20009")),
    "srun-by-the-batch-script": Case(
        srun(5, 8, 5) | {"MASTER_ADDR": "gpu07", "MASTER_PORT": "20011"}, 8, ("5", "8", "5", "gpu07", "20011")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_variables_of_a_launcher(name: str) -> None:
    """With one GPU in sight LOCAL_RANK is 0, whichever rank of its node this is: DeepSpeed takes it for the
    index of the rank's device."""
    case = CASES[name]
    found = rank_variables(case.env, case.num_gpus, lambda nodes: f"at {nodes}")
    assert found == (None if case.expected is None else dict(zip(RANK_VARIABLES, case.expected, strict=True)))
    assert joined_world_size(case.env) == (None if case.expected is None else int(case.expected[1]))
    assert is_first_rank(case.env) == (case.expected is None or case.expected[0] == "0")


@pytest.mark.parametrize("env", [torchrun(3, 8, 3), srun(3, 8, 3)], ids=["torchrun", "srun"])
def test_gpus_that_leave_open_which_is_the_rank_s_own(env: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"^LOCAL_RANK=3: .* sees 2 GPUs; let it see one \(srun --gpus-per"):
        rank_variables(env, 2, str)
