"""What the scenarios of `test_slurm` play on: sweeps on a private SLURM, and looks into their folders."""

import contextlib
import dataclasses
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from helpers.slurm_cluster import Cluster
from rcpo.runs.folder import RunFolder
from rcpo.sweep.definition import read_definition
from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.grow import plan_growth, write_growth
from rcpo.sweep.local import sweep_held
from rcpo.sweep.slurm import submit as slurm
from rcpo.sweep.slurm.profile import SlurmTarget, read_profile
from rcpo.sweep.states import CellStatus, State

SECONDS = 400
"""How long all scenarios together may take; they share two cores."""
NUM_STEPS = 150
OVERRIDES = [
    "tracking=none", "train.pairs_per_step=4", "data.train_pairs=16", "data.eval_pairs=4",
    "train.eval_every=0", "train.save_every=40",
]  # fmt: skip
ALONE = threading.Lock()


@contextlib.contextmanager
def said() -> Iterator[io.StringIO]:
    """What this process prints meanwhile. One thread at a time: stdout and Hydra are the process's."""
    with ALONE, contextlib.redirect_stdout(io.StringIO()) as text:
        yield text


@dataclass
class Stage:
    """Where the scenarios play."""

    cluster: Cluster
    folder: Path
    deadline: float = dataclasses.field(default_factory=lambda: time.monotonic() + SECONDS)

    def write(self, name: str, profile: dict[str, Any], **definition: Any) -> tuple[Path, Path]:
        """A sweep file and a profile."""
        file, profile_file = self.folder / f"{name}.yaml", self.folder / f"{name}-profile.yaml"
        overrides = [*OVERRIDES, f"train.steps={NUM_STEPS}", *definition.pop("overrides", [])]
        file.write_text(yaml.safe_dump({"overrides": overrides} | definition))
        profile_file.write_text(yaml.safe_dump(profile))
        return file, profile_file

    def freeze(self, name: str, profile: dict[str, Any], **definition: Any) -> "Sweep":
        """A sweep that is frozen, with its script, and not submitted."""
        file, profile_file = self.write(name, profile, **definition)
        out = self.folder / "sweeps" / name
        folder = SweepFolder(out)
        with said(), sweep_held(folder):
            definition = read_definition(str(file))
            growth = plan_growth(definition, folder, SlurmTarget(read_profile(str(profile_file))))
            write_growth(folder, definition, growth)
            assert slurm.submit(folder, str(profile_file), None, names=()) == 0
        return Sweep(folder, self)


class Sweep:
    """A sweep folder as the scenarios and the tests look at it."""

    def __init__(self, folder: SweepFolder, stage: Stage) -> None:
        self.folder, self._cluster, self._deadline = folder, stage.cluster, stage.deadline
        names = [cell.name for cell in folder.read_cells()]
        self.frozen_ids = {name: self.run(name).read_run()["wandb_id"] for name in names}

    def statuses(self) -> dict[str, CellStatus]:
        return {status.cell.name: status for status in slurm.read_statuses(self.folder)}

    def states(self) -> dict[str, State]:
        return {name: status.state for name, status in self.statuses().items()}

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder.cells / name)

    def log(self, name: str) -> str:
        path = self.folder.logs / f"{name}.log"
        return path.read_text() if path.is_file() else ""

    def num_rows(self, name: str) -> int:
        path = self.run(name).metrics
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def wait(self, is_true: Callable[[], object], what: str, may_fail: bool = False) -> None:
        """Until it is true; fails when time is up or, unless it may, when a cell has failed."""
        while not is_true():
            failed = [name for name in self.frozen_ids if self.run(name).read_run()["status"] == "failed"]
            if time.monotonic() > self._deadline or (failed and not may_fail):
                logs = "\n".join(path.read_text()[-3000:] for path in self.folder.logs.glob("*.log"))
                raise AssertionError(f"{what}: not in time, or a cell failed; {self.statuses()}\n{logs}")
            time.sleep(0.1)

    def wait_for_rows(self, name: str, count: int = 3) -> None:
        self.wait(lambda: self.num_rows(name) >= count, f"{name} makes {count} steps")

    def wait_for(self, state: State, may_fail: bool = False) -> None:
        self.wait(lambda: set(self.states().values()) == {state}, f"all cells are {state}", may_fail)
        self.wait_for_no_job()

    def wait_for_no_job(self) -> None:
        self.wait(
            lambda: not any(status.queued for status in self.statuses().values()), "no job is left", True
        )

    def ranks(self, name: str) -> list[int]:
        """Process ids of a cell's ranks, in order."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if str(self.folder.cells / name).encode() in words and b"rcpo.cli" in words:
                        env = dict(
                            item.split(b"=", 1)
                            for item in (entry / "environ").read_bytes().split(b"\0")
                            if b"=" in item
                        )
                        if words[0].endswith(b"srun"):
                            continue
                        found[int(env[b"SLURM_PROCID"])] = int(entry.name)
        return [found[rank] for rank in sorted(found)]

    def send(self, name: str, number: int) -> None:
        for pid in self.ranks(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def submit(self) -> str:
        """`rcpo resume SWEEP` but for reading the command line; returns what it says."""
        with said() as text:
            assert slurm.resubmit(self.folder) == 0
        return text.getvalue()

    def submit_by_hand(self) -> None:
        self._cluster.run("sbatch", self.folder.submit)


def events(log: str) -> list[str]:
    """What a cell's batch scripts said of its starts and ends."""
    return re.findall(r"^== \S+ \S+ \S+ (starts: .*|ends: .*)$", log, flags=re.MULTILINE)


def comparable(run: RunFolder) -> list[dict[str, Any]]:
    """Rows without what a clock says."""
    rows = [*run.rows(run.metrics), *run.rows(run.eval)]
    return [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in rows]
