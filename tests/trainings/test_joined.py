"""Ranks that srun or torchrun started, while rank 0 prepares for all: two forked processes over gloo."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.groups import _clone_world_group

import rcpo.ranks.distributed
import rcpo.training.ending
from rcpo.common.errors import StoppedError, UserError
from rcpo.launch import start
from rcpo.ranks.distributed import RANK_VARIABLES, done_by_rank_zero, free_port, spoken_for

REST = pytest.mark.ci("ranks that wait for rank 0")


def in_two_ranks(work: Callable[[int], Any], tmp_path: Path, timeout_seconds: float = 60) -> list[str]:
    """What `work(rank)` returned or raised on both ranks, as text; an AssertionError when one is not done in
    time."""
    port = free_port()
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= dict(
                    zip(RANK_VARIABLES, (str(number), "2", str(number), "127.0.0.1", str(port)), strict=True)
                )
                said = f"returned {work(number)}"
            except BaseException as error:
                said = f"raised {type(error).__name__}: {error}"
            try:
                (tmp_path / f"said-{number}").write_text(said)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    deadline = time.monotonic() + timeout_seconds
    waiting = set(children)
    while waiting and time.monotonic() < deadline:
        waiting -= {child for child in waiting if os.waitpid(child, os.WNOHANG) != (0, 0)}
        time.sleep(0.02)
    for child in waiting:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert not waiting
    return [(tmp_path / f"said-{number}").read_text() for number in range(2)]


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (ZeroDivisionError("by accident"), 1, "raised ZeroDivisionError: by accident"),
        (UserError("data.path=x: no such file"), 2, "raised UserError: data.path=x: no such file"),
        (KeyboardInterrupt(), 1, "raised KeyboardInterrupt: "),
    ],
    ids=["fault", "bad-input", "ctrl-c"],
)
def test_the_other_ranks_end_with_rank_0_whatever_it_fails_of(
    tmp_path: Path, fault: BaseException, code: int, said: str
) -> None:
    def prepare() -> None:
        raise fault

    assert in_two_ranks(lambda number: start.start(prepare), tmp_path) == [said, f"returned {code}"]


def test_a_preparation_longer_than_a_collective_may_take_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collectives that give up after 2 seconds, signs every half second, an answer after 5 seconds."""
    monkeypatch.setattr(rcpo.ranks.distributed, "SECONDS_BETWEEN_SIGNS", 0.5)

    def work(number: int) -> dict[str, Any]:
        dist.init_process_group("gloo", timeout=timedelta(seconds=2))
        with spoken_for() as tell:
            if number == 0:
                time.sleep(5)
                tell({"run": "here"})
        return tell.heard

    assert in_two_ranks(work, tmp_path) == ["returned {'run': 'here'}"] * 2


def test_a_rank_0_that_dies_while_preparing_ends_the_others(tmp_path: Path) -> None:
    def work(number: int) -> None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=30))
        with spoken_for():
            if number == 0:
                (tmp_path / "said-0").write_text("died")
                os._exit(1)

    started = time.monotonic()
    died, other = in_two_ranks(work, tmp_path)
    assert died == "died"
    assert other.startswith("raised ")  # of gloo: the connection is gone
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(("num_visible", "own"), [(1, 0), (8, 3)], ids=["one-visible", "all-visible"])
def test_a_task_of_srun_takes_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, num_visible: int, own: int
) -> None:
    """Task 3 of a node, with --gpus-per-task=1 and with all eight GPUs in sight: its device, and what
    DeepSpeed will read, from LOCAL_RANK."""
    taken: list[torch.device] = []
    joined: list[str] = []
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    task = {"JOB_ID": 7, "STEP_ID": 0, "STEP_NUM_TASKS": 8, "PROCID": 3, "LOCALID": 3, "STEP_NODELIST": "n1"}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setattr(rcpo.ranks.distributed, "_said_by_scontrol", lambda *words: "127.0.0.1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", SimpleNamespace())
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: joined.append(os.environ["LOCAL_RANK"]))
    assert rcpo.ranks.distributed.initialize("cuda") == torch.device("cuda", own)
    assert (taken, joined) == ([torch.device("cuda", own)], [str(own)])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, ["returned 7"] * 2),
        pytest.param(UserError("path=x: bad"), ["raised UserError: path=x: bad"] * 2, marks=REST),
        pytest.param(StoppedError("by SIGTERM"), ["raised StoppedError: by SIGTERM"] * 2, marks=REST),
        pytest.param(OSError("full"), ["raised OSError: full", "raised RuntimeError: full"], marks=REST),
    ],
    ids=["done", "bad-input", "stopped", "fault"],
)
def test_what_rank_0_does_alone_is_everyone_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException | None, said: list[str]
) -> None:
    """It takes a second where collectives give up after half of one."""
    monkeypatch.setattr(rcpo.ranks.distributed, "SECONDS_BETWEEN_SIGNS", 0.1)

    def alone() -> int:
        time.sleep(1)
        if fault is not None:
            raise fault
        return 7

    def work(number: int) -> int:
        dist.init_process_group("gloo", timeout=timedelta(seconds=0.5))
        return done_by_rank_zero(alone)

    assert in_two_ranks(work, tmp_path) == said


def test_the_other_ranks_stay_until_rank_0_has_written_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun ends what is left WaitTime after the first task has gone."""
    written = tmp_path / "written"

    def write(training: Any, weights: dict[str, torch.Tensor], *rest: Any) -> dict[str, Any]:
        time.sleep(0.5)
        written.touch()
        return {"step": len(weights)}

    def work(number: int) -> tuple[dict[str, Any], bool]:
        dist.init_process_group("gloo")
        engine = SimpleNamespace(whole_weights=lambda: {"w": torch.zeros(1)} if number == 0 else None)
        training: Any = SimpleNamespace(engine=engine)
        return rcpo.training.ending.finish(training, None, dict), written.exists()

    monkeypatch.setattr(rcpo.training.ending, "_write_end", write)
    assert in_two_ranks(work, tmp_path) == ["returned ({'step': 1}, True)"] * 2


def test_groups_of_deepspeed_have_as_much_time_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rcpo.ranks.distributed, "COLLECTIVE_TIMEOUT_MINUTES", 17)

    def seconds(group: dist.ProcessGroup | None) -> float:
        group = group or dist.distributed_c10d._get_default_group()
        return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())

    def work(number: int) -> list[float]:
        rcpo.ranks.distributed.initialize("cpu")
        found = [seconds(None), seconds(deepspeed.comm.new_group([0, 1])), seconds(_clone_world_group())]
        dist.barrier()  # rank 0 has the store, and leaves when all have read it
        return found

    assert in_two_ranks(work, tmp_path) == ["returned [1020.0, 1020.0, 1020.0]"] * 2
