"""The sweep folder: paths, and the frozen cells that manifest.jsonl lists.

    SWEEP/sweep.yaml      what the sweep was made from      SWEEP/manifest.jsonl   one frozen cell a line
    SWEEP/cells/NAME/     the cells' run folders            SWEEP/.lock            held by what runs them here
    SWEEP/study.log       optuna's, of a search
    SWEEP/submit.sbatch  array.txt  slurm.json  logs/       of SLURM

`rcpo.sweep.grow` writes it; everything else reads. A cell is started and continued by
`rcpo resume SWEEP/cells/NAME`.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError
from rcpo.runs.folder import RunFolder


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    name: str
    axes: dict[str, Any]
    """Label of the cell's value on each axis; under `include` the label of an included cell that has one."""
    words: list[str]
    """All its overrides but run_dir and name, as on the command line."""
    digest: str
    """Hash of its frozen config, but for the run folder."""
    after: list[str] = field(default_factory=list)
    """Names of the cells that it waits for: the one that it starts from, and those before that one."""

    def line(self) -> str:
        """Its line of manifest.jsonl."""
        fields = asdict(self)
        return json.dumps({key: value for key, value in fields.items() if key != "after" or value}) + "\n"


class SweepFolder:
    """Paths of one sweep."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.sweep_yaml = self.path / "sweep.yaml"
        self.manifest = self.path / "manifest.jsonl"
        self.cells = self.path / "cells"
        self.logs = self.path / "logs"
        self.lock = self.path / ".lock"
        self.study = self.path / "study.log"
        self.submit = self.path / "submit.sbatch"
        self.slurm = self.path / "slurm.json"

    def run(self, cell: Cell) -> RunFolder:
        return self.run_named(cell.name)

    def run_named(self, name: str) -> RunFolder:
        return RunFolder(self.cells / name)

    def read_cells(self) -> list[Cell]:
        """The frozen cells, in the order in which they run. UserError where there are none."""
        if not self.manifest.is_file():
            raise UserError(f"{self.path}: is not a sweep folder (it has no manifest.jsonl)")
        cells = []
        for number, line in enumerate(self.manifest.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                cells.append(Cell(**json.loads(line)))
            except (ValueError, TypeError):
                raise UserError(
                    f"{self.manifest}: line {number} is damaged; copy the sweep folder again, or sweep anew"
                ) from None
        return cells


def is_sweep(path: str | Path) -> bool:
    """Whether `path` is a sweep folder."""
    return SweepFolder(path).manifest.is_file()
