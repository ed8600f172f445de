"""Cells of a sweep that train nothing, in the place of the processes that `rcpo.sweep.local` starts."""

from types import SimpleNamespace

from rcpo.runs.folder import RunFolder
from rcpo.sweep.folder import Cell


class StandIn:
    """A process whose `poll`, which a test writes, says what it has become."""

    def __init__(self, cell: Cell, run: RunFolder, num_parallel: int) -> None:
        self.cell, self.run, self.process = cell, run, SimpleNamespace(poll=self.poll)

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        raise NotImplementedError

    def record_death(self, code: int, stopping: bool) -> None:
        """It writes itself what became of it."""

    def seconds(self) -> float:
        return 1.0

    def kill(self) -> None:
        """There is nothing to kill."""
