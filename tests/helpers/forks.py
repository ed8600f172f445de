"""Work in a forked process of its own, so that what it sets up or breaks is gone afterwards."""

import os
from collections.abc import Callable

from rcpo.ranks.distributed import initialize, shut_down
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.training.loop import train
from rcpo.training.read_inputs import read_inputs


def in_a_fork(work: Callable[[], None]) -> None:
    """Run `work` in a process of its own; its AssertionError is this test's."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}"[:4000].encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    said = os.read(reader, 4000).decode()
    os.close(reader)
    assert status == 0, said


def train_here(run: RunFolder, resume: bool = False) -> None:
    device = initialize("cpu")
    try:
        _, config = open_run(str(run.path))
        train(config, run, read_inputs(config), device, resume)
    finally:
        shut_down()
