"""Cells that start from another cell: what is refused, what is frozen, and who waits for whom. The cells here
are stand-ins; `tests/processes/test_sweep_runs.py` has real ones."""

import shutil
from pathlib import Path
from typing import ClassVar

import pytest

from helpers.stand_in_cells import StandIn
from rcpo.common.errors import UserError
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.sweep import local
from rcpo.sweep.definition import definition_of, read_definition
from rcpo.sweep.folder import Cell, SweepFolder
from rcpo.sweep.grow import mend, plan_growth, write_growth
from rcpo.sweep.slurm import submit as slurm
from rcpo.sweep.slurm.queue import Job
from rcpo.sweep.start import ancestors
from rcpo.sweep.states import State, read_status
from rcpo.sweep.target import Here

GRID = """
overrides: [tracking=none, train.steps=3]
first: {sft: [objective=sft]}
axes:
  model.path: [{label: base, overrides: ["model.path=builtin:tiny"]}, cell:sft]
  calibration: [off]
"""


def made(folder: Path, text: str = GRID) -> SweepFolder:
    """Freeze and write the sweep of this file."""
    (folder / "grid.yaml").write_text(text)
    definition = read_definition(str(folder / "grid.yaml"))
    sweep = SweepFolder(folder / "out")
    sweep.path.mkdir(exist_ok=True)
    growth = plan_growth(definition, sweep, Here())
    if growth.new:
        write_growth(sweep, definition, growth)
    return sweep


def test_a_cell_starts_from_the_final_of_another(tmp_path: Path) -> None:
    """With the defaults of the model at the root: 3e-4 is the learning rate of builtin:tiny alone. Cells are
    as they were when the file grows, and a cell whose folder is gone comes back the same."""
    sweep = made(tmp_path)
    assert [(cell.name, cell.after) for cell in sweep.read_cells()] == [
        ("sft", []), ("base-off", []), ("sft-off", ["sft"]),
    ]  # fmt: skip
    _, first = open_run(str(sweep.cells / "sft"))
    _, base = open_run(str(sweep.cells / "base-off"))
    _, config = open_run(str(sweep.cells / "sft-off"))
    assert (first.objective["name"], config.objective["name"]) == ("sft", "dpo")
    assert config.model.path == str(sweep.cells / "sft" / "final")
    assert config.optim.lr == base.optim.lr == 3e-4
    frozen = (sweep.cells / "sft-off" / "config.yaml").read_bytes()
    made(tmp_path, GRID.replace("[off]", "[off, on]"))
    assert [cell.name for cell in sweep.read_cells()] == ["sft", "base-off", "sft-off", "base-on", "sft-on"]
    shutil.rmtree(sweep.cells / "sft-off")
    assert mend(sweep) == ["sft-off"]
    assert (sweep.cells / "sft-off" / "config.yaml").read_bytes() == frozen
    with pytest.raises(UserError, match="its cells were frozen otherwise"):
        made(tmp_path, GRID.replace("objective=sft", "objective=ipo"))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            ("cell:sft", "cell:sfd"),
            "cell sfd-off: model.path=cell:sfd: the sweep has no cell of that name; the closest are sft",
        ),
        (
            ("[objective=sft]", "[objective=sft, 'model.path=cell:base-off']"),
            None,
        ),
        (
            ("[objective=sft]", "[objective=sft, 'model.path=cell:sft-off']"),
            "cell sft: sft starts from sft-off starts from sft: no cell can be the first; give one of them "
            "another model.path",
        ),
        (
            ("[objective=sft]", "[objective=sft, 'model.path=cell:sft']"),
            "cell sft: sft starts from sft: no cell can be the first; give one of them another model.path, "
            "or write model.path: [cell:sft] under axes",
        ),
        (
            ("[objective=sft]", "[objective=sft, model.lora.rank=4, model.lora.save=adapter]"),
            "cell sft-off: starts from sft, which saves an adapter and no whole model; type "
            "model.lora.save=merged for sft",
        ),
        (("first: {sft", "first: {s/t"), None),
        (("first: {sft: [objective=sft]}", "first: [sft]"), None),
    ],
)  # fmt: skip
def test_what_cannot_start_is_one_line(tmp_path: Path, change: tuple[str, str], fault: str | None) -> None:
    """Nothing is written. A chain of three is none of these."""
    text = GRID.replace(*change)
    assert text != GRID
    if "base-off" in text:
        sweep = made(tmp_path, text)
        assert sweep.read_cells()[-1].after == ["sft", "base-off"]
        return
    with pytest.raises(UserError) as caught:
        made(tmp_path, text)
    if fault is not None:
        assert str(caught.value) == fault
    else:
        assert str(caught.value).startswith(f"{tmp_path / 'grid.yaml'}: first: ")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_a_circle_further_up_names_its_own_cells() -> None:
    words = {"a": ["model.path=cell:b"], "b": ["model.path=cell:c"], "c": ["model.path=cell:b"]}
    with pytest.raises(UserError, match=r"^cell b: b starts from c starts from b: "):
        ancestors("a", words)


def test_a_search_has_no_first_cells() -> None:
    tree = {"axes": {"optim.lr": {"type": "float", "low": "1e-5", "high": "1e-3"}}, "first": {"sft": []}}
    with pytest.raises(UserError, match=r"^first: is for grids"):
        definition_of(tree, "x", [])


class Ends(StandIn):
    """A process that is over at the second look; `failing` names those that fail."""

    failing: tuple[str, ...] = ()
    started: ClassVar[list[str]] = []

    def __init__(self, cell: Cell, run: RunFolder, num_parallel: int) -> None:
        super().__init__(cell, run, num_parallel)
        self._looks = 0
        self.started.append(cell.name)
        run.update_run(status="running")

    def poll(self) -> int | None:
        self._looks += 1
        if self._looks < 2:
            return None
        failed = self.cell.name in self.failing
        self.run.update_run(status="failed" if failed else "done", exit_reason="no luck" if failed else None)
        return int(failed)


def chain(folder: Path) -> SweepFolder:
    """other, last <- middle <- first, written in this order."""
    sweep = SweepFolder(folder)
    for name, after in (("last", ["middle", "first"]), ("middle", ["first"]), ("first", []), ("other", [])):
        cell = Cell(name, {"objective": name}, [], "digest", after)
        sweep.run(cell).path.mkdir(parents=True)
        sweep.run(cell).update_run(status="pending")
        with sweep.manifest.open("a") as stream:
            stream.write(cell.line())
    return sweep


def test_cells_wait_for_the_one_that_they_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_Child", Ends)
    monkeypatch.setattr(Ends, "started", [])
    sweep = chain(tmp_path)
    waiting = read_status(sweep, sweep.read_cells()[0], None)
    assert (waiting.state, waiting.reason) == (State.PENDING, "waits for middle")
    assert local.run_unfinished(sweep, 2) == 0
    assert Ends.started == ["first", "other", "middle", "last"]


def test_what_starts_from_a_failed_cell_is_blocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says so; when the cell has been mended, the same command runs the rest."""
    monkeypatch.setattr(local, "_Child", Ends)
    monkeypatch.setattr(Ends, "started", [])
    monkeypatch.setattr(Ends, "failing", ("first",))
    sweep = chain(tmp_path)
    assert local.run_unfinished(sweep, 1) == 1
    assert Ends.started == ["first", "other"]
    said = capsys.readouterr().out
    assert "1 cell blocked: each starts from first, which failed" in said
    assert "1 cell blocked: each starts from middle and so from first, which failed" in said
    assert "4 cells: 1 done, 1 failed, 2 blocked" in said
    monkeypatch.setattr(Ends, "failing", ())
    assert local.run_unfinished(sweep, 1) == 0
    assert Ends.started == ["first", "other", "first", "middle", "last"]


def test_slurm_starts_them_behind_the_task_of_that_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One array for the cells that start from the same one, behind that one's task; a task that was queued
    before counts as well."""
    said: list[list[str]] = []

    def answer(words: list[str]) -> str:
        said.append(words)
        return f"{70 + len(said)}\n"

    sweep = chain(tmp_path)
    monkeypatch.setattr(slurm, "said_by", answer)
    monkeypatch.setattr(slurm, "jobs_of_sweep", lambda sweep: {})
    assert slurm._submit_missing(sweep, {"last", "middle", "first", "other"}) == 0
    assert [[word for word in words if "array=" in word or "dep" in word] for words in said] == [
        ["--array=2-3"],
        ["--kill-on-invalid-dep=yes", "--dependency=afterok:71_2", "--array=1"],
        ["--kill-on-invalid-dep=yes", "--dependency=afterok:72_1", "--array=0"],
    ]
    said.clear()
    monkeypatch.setattr(slurm, "jobs_of_sweep", lambda sweep: {2: Job("9", 2, "RUNNING", "n1", "None", 2)})
    assert slurm._submit_missing(sweep, {"middle", "first"}) == 0
    assert [word for word in said[0] if "dependency" in word] == ["--dependency=afterok:9_2"]
    assert len(said) == 1
