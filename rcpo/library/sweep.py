"""`rcpo.open_sweep`: a sweep folder from Python, cell by cell."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.common.errors import UserError
from rcpo.library.compare import Comparison, compare
from rcpo.library.run import Run

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SweepCell:
    """One run of a grid, as it was when it was asked for."""

    name: str
    words: list[str]
    """All its words but name and run_dir, as on the command line of `rcpo train`."""
    axes: dict[str, Any]
    """Its value on each axis of the grid."""
    state: str
    """pending, running, preempted, interrupted, failed, lost or done."""
    step: int
    """Optimizer steps done."""
    reason: str | None
    """Why it has stopped, where it has and is not done."""
    run: Run


class Sweep:
    """A grid that `rcpo sweep` has frozen; `rcpo sweep`, `rcpo resume` and SLURM run its cells.

    sweep = rcpo.open_sweep("sweeps-out/demo")
    sweep.table                      # a row a cell: its axes, state, step, loss, chosen
    sweep["dpo-on-seed0"].run.eval   # a cell by its name
    sweep.compare().table            # what `rcpo compare sweeps-out/demo` prints
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises UserError where `path` is no sweep folder."""
        self.path = Path(path).absolute()
        self._folder.read_cells()

    @property
    def _folder(self) -> Any:
        from rcpo.sweep.folder import SweepFolder

        return SweepFolder(self.path)

    @property
    def cells(self) -> list[SweepCell]:
        """All cells now, in the order in which they run; of a sweep that SLURM runs, as its queue says."""
        from rcpo.sweep.status import read_statuses

        return [
            SweepCell(
                status.cell.name, status.cell.words, status.cell.axes, str(status.state), status.step,
                status.reason, Run(self._folder.run(status.cell).path),
            )
            for status in read_statuses(self._folder)
        ]  # fmt: skip

    @property
    def table(self) -> "pd.DataFrame":
        """One row a cell: name, its value on each axis, state, step, loss, chosen (held-out, in nats)."""
        import pandas as pd

        from rcpo.sweep.status import read_statuses

        rows = [
            {
                "name": status.cell.name, **status.cell.axes, "state": str(status.state), "step": status.step,
                "loss": status.loss, "chosen": status.chosen,
            }
            for status in read_statuses(self._folder)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def compare(self, **options: Any) -> Comparison:
        """`rcpo.compare` of its runs."""
        return compare(self.path, **options)

    def __getitem__(self, name: str) -> SweepCell:
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise UserError(f"{name}: {self.path} has no such cell; list(sweep) has them all")

    def __iter__(self) -> Iterator[SweepCell]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self._folder.read_cells())

    def __repr__(self) -> str:
        states = [cell.state for cell in self.cells]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return f"<rcpo.Sweep {self.path.name}: {len(states)} cells, {counts}>"


def open_sweep(path: str | os.PathLike[str]) -> Sweep:
    """The sweep in a folder that `rcpo sweep` has made. Raises UserError where there is none."""
    return Sweep(path)
