"""Ranks: who this process is, how it joins the others, and the two collectives that rcpo itself uses.

Ranks are started by `rcpo.launch.start`, by torchrun or by srun; either way each process ends up with the
five variables of `rcpo.ranks.environment`, which is all that DeepSpeed needs (with one missing it would look
for MPI).
"""

import contextlib
import functools
import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rcpo.common.errors import error_of
from rcpo.ranks.environment import RANK_VARIABLES, rank_variables
from rcpo.ranks.transfer import to_device

COLLECTIVE_TIMEOUT_MINUTES = 30
"""Of every group, DeepSpeed's too: between two ranks that do the same. What rank 0 does alone may take longer
(`done_by_rank_zero`)."""
SECONDS_BETWEEN_SIGNS = 20.0
"""How often a rank 0 that others wait for lets them know."""
Done = TypeVar("Done")
_made_here: set[str] = set()
"""Variables that `initialize` has set for a world of one."""


def _address_of_first(nodes: str) -> str:
    """Of SLURM's list of nodes, as compressed as SLURM writes it."""
    return _address_of(_said_by_scontrol("show", "hostnames", nodes).split()[0])


def _address_of(node: str) -> str:
    """The node's name where it resolves, else the address that SLURM itself reaches it by."""
    try:
        socket.gethostbyname(node)
        return node
    except OSError:
        fields = _said_by_scontrol("--oneliner", "show", "node", node).split()
        addresses = [field.removeprefix("NodeAddr=") for field in fields if field.startswith("NodeAddr=")]
        return addresses[0] if addresses else node


def _said_by_scontrol(*words: str) -> str:
    done = subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True)
    return done.stdout


def free_port() -> int:
    """A TCP port that was free on this host a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def single_rank_environment() -> dict[str, str]:
    """The five variables for a world of one."""
    return dict(zip(RANK_VARIABLES, ("0", "1", "0", "127.0.0.1", str(free_port())), strict=True))


def initialize(device: str) -> torch.device:
    """Join the process group (gloo on CPU, NCCL on GPUs) and return this rank's device.

    Marks DeepSpeed's shared-memory collective as absent: it would be compiled here (a compiler, minutes) and
    gloo serves as well. The attribute is private, hence the pinned version in pyproject.toml.
    """
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    own = rank_variables(os.environ, num_gpus, _address_of_first)
    if own is None:
        own = single_rank_environment()
        _made_here.update(RANK_VARIABLES)
    os.environ.update(own)
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger

    if device == "cpu":
        _use_cpu_accelerator()
    deepspeed_logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local = torch.device(device)
    if device == "cuda":
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local)
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        timeout=timedelta(minutes=COLLECTIVE_TIMEOUT_MINUTES),
        verbose=False,
    )
    _give_time_to_groups_of_deepspeed()
    return local


def _give_time_to_groups_of_deepspeed() -> None:
    """DeepSpeed makes groups of its own for what its stages exchange, and torch gives those 10 minutes on
    GPUs."""
    from deepspeed.comm import comm

    timeout = timedelta(minutes=COLLECTIVE_TIMEOUT_MINUTES)
    comm.cdb.new_group = lambda ranks: dist.new_group(ranks, timeout=timeout)


def _use_cpu_accelerator() -> None:
    """Where DeepSpeed was imported before this run's device was known, it has selected a GPU by itself."""
    from deepspeed import accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    if accelerator.get_accelerator().device_name() != "cpu":
        accelerator.set_accelerator(CPU_Accelerator())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum in place over all ranks; the same bits on every rank."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def sum_parts_over_ranks(device: torch.device, **parts: Tensor | list[float]) -> dict[str, list[float]]:
    """Each named part summed over all ranks, entry by entry in fp64: one reduction, and one wait for the
    device. A part may be on it or be a list. Collective; every rank gives the same names and shapes."""
    flat = {
        name: part.double().flatten()
        if isinstance(part, Tensor)
        else to_device(torch.tensor(part, dtype=torch.float64), device)
        for name, part in parts.items()
    }
    totals = sum_over_ranks(torch.cat(list(flat.values()))).tolist()
    starts = itertools.accumulate((len(part) for part in flat.values()), initial=0)
    places = zip(flat.items(), starts, strict=False)
    return {name: totals[start : start + len(part)] for (name, part), start in places}


def from_rank_zero(value: Any) -> Any:
    """The picklable `value` of rank 0, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class _Tell:
    """Calling it on rank 0 gives `heard` to every rank; see `spoken_for`."""

    def __init__(self) -> None:
        self.heard: dict[str, Any] = {}
        self._said = threading.Event()

    def __call__(self, answer: dict[str, Any]) -> None:
        self.heard = answer
        self._said.set()

    def speak(self, group: dist.ProcessGroup | None) -> None:
        """Rank 0's side: a sign every SECONDS_BETWEEN_SIGNS until there is an answer, then the answer."""
        while not self._said.wait(SECONDS_BETWEEN_SIGNS):
            dist.broadcast_object_list([None], src=0, group=group)
        dist.broadcast_object_list([self.heard], src=0, group=group)

    def listen(self, group: dist.ProcessGroup | None) -> None:
        """The others' side: wait for the answer, for as long as signs come."""
        box: list[Any] = [None]
        while box[0] is None:
            dist.broadcast_object_list(box, src=0, group=group)
        self.heard = box[0]


@contextlib.contextmanager
def spoken_for() -> Iterator[_Tell]:
    """While open, rank 0 works for all and tells its answer in the end; the others wait when they leave. On
    every rank the answer is `heard` afterwards.

    A silent wait would end after COLLECTIVE_TIMEOUT_MINUTES, whatever rank 0 is doing; a thread of rank 0
    gives signs meanwhile, over gloo, which needs no GPU. Collective.
    """
    tell = _Tell()
    if world_size() == 1:
        yield tell
        return
    group = _group_of_signs()
    if rank() != 0:
        yield tell
        tell.listen(group)
        return
    speaker = threading.Thread(target=tell.speak, args=(group,), daemon=True)
    speaker.start()
    try:
        yield tell
    finally:
        speaker.join()


@functools.cache
def _group_of_signs() -> dist.ProcessGroup | None:
    """One for all signs of this process, until `shut_down`. Collective."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def done_by_rank_zero(work: Callable[[], Done]) -> Done:
    """What `work` returns on rank 0, picklable, on every rank; the others wait, however long it takes. What
    rank 0 fails of is raised everywhere: bad input as it is, anything else on the others as RuntimeError.
    Collective; `work` must not be."""
    with spoken_for() as tell:
        if rank() == 0:
            try:
                tell({"done": work()})
            except BaseException as error:
                tell({"exit_code": getattr(error, "exit_code", 1), "line": str(error)})
                raise
    if "done" not in tell.heard:
        raise error_of(tell.heard["exit_code"], tell.heard["line"])
    done: Done = tell.heard["done"]
    return done


def gather(value: Any) -> list[Any]:
    """The picklable `value` of every rank, in order of rank, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def shut_down() -> None:
    """Leave the process group, so that this process may join another one later."""
    if dist.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()
    for name in _made_here:
        os.environ.pop(name, None)
    _made_here.clear()
    _group_of_signs.cache_clear()


def reduce_scatter(values: Tensor) -> Tensor:
    """This rank's share along dimension 0 of the sum of `values` over all ranks; `values` itself with one
    rank.

    Dimension 0 must be a multiple of the number of ranks.
    """
    return begin_reduce_scatter(values)()


def begin_reduce_scatter(values: Tensor) -> Callable[[], Tensor]:
    """The same in two parts: what it returns waits for the share, and on a GPU lets the device wait. Until
    then `values` must not change."""
    if world_size() == 1:
        return lambda: values
    share = values.new_empty(values.shape[0] // world_size(), *values.shape[1:])
    whole = values.contiguous()
    # torch 2.13 renamed it.
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work = collective(share, whole, async_op=True)

    def wait() -> Tensor:
        work.wait()
        assert len(whole) == len(share) * world_size()  # and so it has lived until now
        return share

    return wait
