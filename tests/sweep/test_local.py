"""What `rcpo sweep` and `rcpo resume SWEEP` show while cells run: frames of the live table, read from a
terminal in the middle of a sweep. Cells are stand-ins that write rows; `tests/processes/test_sweep_runs.py`
has real ones."""

import io
import json
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from helpers.stand_in_cells import StandIn
from rcpo.runs.folder import RunFolder
from rcpo.sweep import local
from rcpo.sweep.folder import Cell, SweepFolder
from rcpo.sweep.states import State, read_status

NUM_LOOKS = 4


class Steps(StandIn):
    """A process that makes one step whenever it is asked whether it has ended, and is done after four."""

    def __init__(self, cell: Cell, run: RunFolder, num_parallel: int) -> None:
        super().__init__(cell, run, num_parallel)
        self._step = 0
        run.update_run(status="running")

    def poll(self) -> int | None:
        if self._step == NUM_LOOKS:
            self.run.update_run(status="done")
            return 0
        self._step += 1
        with self.run.metrics.open("a") as stream:
            stream.write(
                json.dumps({"step": self._step, "train/loss": 0.5, "speed/step_seconds": 1.0}) + "\n"
            )
        return None


def made(folder: Path, *names: str) -> SweepFolder:
    """A sweep of pending cells of four steps."""
    sweep = SweepFolder(folder)
    for name in names:
        cell = Cell(name, {"objective": name}, [], "digest")
        sweep.run(cell).path.mkdir(parents=True)
        sweep.run(cell).config.write_text(yaml.safe_dump({"train": {"steps": NUM_LOOKS, "epochs": None}}))
        sweep.run(cell).update_run(status="pending")
        with sweep.manifest.open("a") as stream:
            stream.write(cell.line())
    return sweep


def frames(
    sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch, width: int = 80, height: int = 24
) -> tuple[list[str], str]:
    """All frames that a terminal gets while the sweep runs, and what is said at the end."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, height=height, highlight=False)
    monkeypatch.setattr(local, "RunConsole", lambda: console)
    monkeypatch.setattr(local, "_Child", Steps)
    monkeypatch.setattr(local, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(local, "SECONDS_BETWEEN_TABLES", 0.0)
    # Nothing holds the stand-ins' locks: what run.json says of them is so.
    monkeypatch.setattr("rcpo.sweep.states.is_held", lambda lock: (lock.parent / "metrics.jsonl").is_file())
    assert local.run_unfinished(sweep, 1) == 0
    shown = [
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part)
        for part in re.split(r"\x1b\[2K|\x1b\[\?25l", stream.getvalue())
    ]
    text = "\n".join(shown)
    parts = re.split(r"(?=^ *cell +state)", text, flags=re.M)
    return parts[1:], text


def test_the_live_table_shows_every_step_while_cells_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = made(tmp_path, "dpo", "ipo")
    seen, text = frames(sweep, monkeypatch)
    middle = [frame for frame in seen if re.search(r"dpo +running +2/4", frame)]
    assert middle, text
    assert re.search(r"ipo +pending +0/4", middle[0])
    assert "2 cells: 1 running, 1 pending" in middle[0]
    assert re.search(r"dpo +done +4/4", seen[-1])
    assert re.search(r"ipo +done +4/4", seen[-1])
    assert all(len(line) <= 80 for line in seen[0].splitlines())


def test_at_its_end_a_sweep_points_to_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = frames(made(tmp_path, "dpo"), monkeypatch)
    assert f"`rcpo compare {tmp_path}` puts the runs side by side" in text.replace("\n", "")


def test_of_more_cells_than_lines_those_that_run_are_shown_and_no_line_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = made(tmp_path, *(f"a-long-name-of-a-cell-{number}" for number in range(7)))
    seen, _ = frames(sweep, monkeypatch, width=40, height=13)
    assert all("a-long-name-of-a-cell-" in frame for frame in seen)
    running = [frame for frame in seen if "cell-6" in frame and "running" in frame]
    assert running
    assert "…" not in "".join(seen)
    assert all(len(line) <= 40 for frame in seen[:-1] for line in frame.splitlines())
    assert read_status(sweep, sweep.read_cells()[-1], None).state is State.DONE
