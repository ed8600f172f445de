"""A sweep folder and its file: which cells are new, which are as they were, and what is written for that.

Owns the promise that what is frozen does not change. Cells run from SWEEP/cells/NAME/config.yaml. A file that
names more cells than the folder has makes the folder grow; a cell that is there keeps its name, its place in
manifest.jsonl and its config, and one whose config would be another is refused, with the difference. A cell
whose folder is gone is frozen again. Does not run anything.

Composing takes a tenth of a second a cell: a cell whose words are those of the manifest is not composed again
while conf/, and where cells run, are what they were. `frozen_with` in sweep.yaml says so.
"""

import contextlib
import dataclasses
import hashlib
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import yaml

from rcpo.common.conf import conf_dir
from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically
from rcpo.sweep.definition import Definition
from rcpo.sweep.expand import DIGEST_LETTERS, LONGEST_NAME, Point, digest_of_axes, expand
from rcpo.sweep.folder import Cell, SweepFolder
from rcpo.sweep.target import Here, Target

if TYPE_CHECKING:  # imports Hydra, which a sweep that is done needs not
    from rcpo.sweep.freeze import FrozenCell

NUM_DIFFERENCES_SHOWN = 5


@dataclass(frozen=True)
class Growth:
    """What a sweep folder has and lacks of its file."""

    new: "list[FrozenCell]"
    """Cells that are not in the manifest, and cells in it whose folder is gone."""
    manifest: list[Cell]
    """All cells of the folder afterwards: those that are there in their order, then the new ones."""
    names: list[str]
    """Of the file's cells, in its order."""
    mark: str
    """Of conf/ and where cells run."""
    seen: bytes = field(default=b"")
    """manifest.jsonl as it was."""

    def line(self, sweep: SweepFolder) -> str:
        """How many cells there are, how many of them are new, and how many the file does not name."""
        text = f"{len(self.names)} cells in {sweep.path}"
        if self.seen and self.new:
            text += f", {len(self.new)} of them new"
        num_others = len(self.manifest) - len(self.names)
        return text if num_others == 0 else f"{text}; {num_others} more there, which the file does not name"


def plan_growth(definition: Definition, sweep: SweepFolder, target: Target) -> Growth:
    """Which cells of the file are new; these are composed and validated, and nothing is written. Raises
    UserError for a cell that cannot be, or that would change."""
    points = expand(definition)
    seen = sweep.manifest.read_bytes() if sweep.manifest.is_file() else b""
    there = sweep.read_cells() if seen else []
    by_axes = {digest_of_axes(cell.axes): cell for cell in there}
    taken = {cell.name.casefold() for cell in there}
    mark = _mark_of(target)
    is_same = seen != b"" and _read_mark(sweep) == mark
    new, differences = list["FrozenCell"](), Counter[str]()
    cells = [by_axes.get(digest_of_axes(point.axes)) for point in points]
    points = [
        with_free_name(point, taken) if cell is None else dataclasses.replace(point, name=cell.name)
        for point, cell in zip(points, cells, strict=True)
    ]
    names = [point.name for point in points]
    words = {cell.name: cell.words for cell in there} | {point.name: point.words for point in points}
    for point, cell in zip(points, cells, strict=True):
        known = [*point.words, *target.words]
        if is_same and cell is not None and cell.words == known and sweep.run(cell).config.is_file():
            continue
        frozen = _frozen(point, definition, sweep, target, words)
        if cell is None or not sweep.run(cell).config.is_file():
            new.append(frozen)
        elif cell.digest != frozen.cell.digest:
            differences.update(_changes(sweep, frozen))
    _refuse(sweep, differences)
    again = {frozen.cell.name: frozen.cell for frozen in new}
    manifest = [again.pop(cell.name, cell) for cell in there]
    return Growth(new, [*manifest, *again.values()], names, mark, seen)


def _frozen(
    point: Point,
    definition: Definition,
    sweep: SweepFolder,
    target: Target,
    words: Mapping[str, Sequence[str]],
) -> "FrozenCell":
    from rcpo.sweep.freeze import freeze_cell, read_start

    return freeze_cell(point, definition, sweep, target, read_start(point.name, words))


def _changes(sweep: SweepFolder, frozen: "FrozenCell") -> list[str]:
    from rcpo.sweep.freeze import changes

    return list(changes(sweep, frozen))


def with_free_name(point: Point, taken: set[str]) -> Point:
    """The point under a name that no cell of the folder has."""
    if point.name.casefold() not in taken:
        return point
    digest = digest_of_axes(point.axes)
    name = f"{point.name[: LONGEST_NAME - DIGEST_LETTERS - 1]}-{digest}"
    return dataclasses.replace(point, name=name)


def _mark_of(target: Target) -> str:
    """Changes with any file of conf/ and with where cells run."""
    digest = hashlib.sha256(repr(target).encode())
    for path in sorted(conf_dir().rglob("*.yaml")):
        digest.update(path.relative_to(conf_dir()).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _read_mark(sweep: SweepFolder) -> str | None:
    try:
        tree = yaml.safe_load(sweep.sweep_yaml.read_text(encoding="utf-8"))
        return str(tree["frozen_with"])
    except (OSError, yaml.YAMLError, TypeError, KeyError):
        return None


def _refuse(sweep: SweepFolder, differences: Counter[str]) -> None:
    """UserError with the differences, where there are any."""
    if not differences:
        return
    told = [f"{change} in {times} cell{'' if times == 1 else 's'}" for change, times in differences.items()]
    shown = "; ".join(told[:NUM_DIFFERENCES_SHOWN])
    more = len(told) - NUM_DIFFERENCES_SHOWN
    raise UserError(
        f"{sweep.path}: its cells were frozen otherwise ({shown}{f'; {more} more' if more > 0 else ''}); "
        f"type --out FOLDER for a new sweep, or `rcpo resume {sweep.path}` to go on with the frozen one"
    )


def write_growth(sweep: SweepFolder, definition: Definition, growth: Growth) -> None:
    """Write the new cells, then the manifest. Call with the sweep's lock held.

    manifest.jsonl comes last: a folder without it was never finished, holds nothing that has run, and is
    written again. Raises UserError when the folder is something else.
    """
    from rcpo.sweep.freeze import description, write_cells

    if (sweep.manifest.read_bytes() if sweep.manifest.is_file() else b"") != growth.seen:
        raise UserError(f"{sweep.path}: has changed just now; type the same again")
    if not growth.seen:
        _clear(sweep)
    for frozen in growth.new:  # of a cell that was being frozen when the machine went down
        shutil.rmtree(sweep.run(frozen.cell).path, ignore_errors=True)
    write_cells(sweep, growth.new)
    if growth.seen:
        from rcpo.sweep.slurm.submit import keep_id

        keep_id(sweep)
    tree = description(definition) | {"frozen_with": growth.mark}
    write_atomically(sweep.sweep_yaml, yaml.safe_dump(tree, sort_keys=False))
    write_atomically(sweep.manifest, "".join(cell.line() for cell in growth.manifest))


def begin(sweep: SweepFolder, definition: Definition) -> None:
    """Make the folder of a search, without a cell, or write how many trials it has now. Call with the sweep's
    lock held. Raises UserError where the folder is something else."""
    from rcpo.sweep.freeze import description

    if sweep.manifest.is_file() and not sweep.study.is_file() and sweep.read_cells():
        raise UserError(f"{sweep.path}: is a sweep without a search; type --out FOLDER")
    if not sweep.manifest.is_file():
        _clear(sweep)
    tree = description(definition) | {"frozen_with": _mark_of(Here())}
    write_atomically(sweep.sweep_yaml, yaml.safe_dump(tree, sort_keys=False))
    if not sweep.manifest.is_file():
        write_atomically(sweep.manifest, "")


def add_cell(sweep: SweepFolder, frozen: "FrozenCell") -> None:
    """One more cell, behind those that are there. Call with the sweep's lock held."""
    from rcpo.sweep.freeze import write_cells

    shutil.rmtree(sweep.run(frozen.cell).path, ignore_errors=True)
    write_cells(sweep, [frozen])
    cells = [*sweep.read_cells(), frozen.cell]
    write_atomically(sweep.manifest, "".join(cell.line() for cell in cells))


def _clear(sweep: SweepFolder) -> None:
    """Remove what is left of a sweep that was never finished. Raises UserError where it is something else."""
    others = [path for path in sweep.path.iterdir() if path.name != sweep.lock.name]
    if others and not (sweep.sweep_yaml.is_file() or [path.name for path in others] == ["cells"]):
        raise UserError(f"{sweep.path}: exists, is not empty and is no sweep folder; type --out FOLDER")
    for cell_folder in sweep.cells.glob("*"):
        if (cell_folder / "metrics.jsonl").exists():
            raise UserError(f"{sweep.path}: has lost its manifest.jsonl, and {cell_folder.name} has run")
    shutil.rmtree(sweep.cells, ignore_errors=True)


def mend(sweep: SweepFolder) -> list[str]:
    """Freeze again the cells of the manifest whose folders are gone, from the words that it has of them;
    returns their names. Call with the sweep's lock held."""
    lost = [cell for cell in sweep.read_cells() if not sweep.run(cell).config.is_file()]
    if not lost:
        return []
    from rcpo.sweep.freeze import freeze_words, read_start, write_cells

    target: Target = Here()
    if sweep.slurm.is_file():
        from rcpo.sweep.slurm.submit import target_of

        target = target_of(sweep)
    group = None
    with contextlib.suppress(OSError, yaml.YAMLError, TypeError, KeyError):
        group = str(yaml.safe_load(sweep.sweep_yaml.read_text(encoding="utf-8"))["group"])
    words = {cell.name: cell.words for cell in sweep.read_cells()}
    frozen = [
        freeze_words(
            cell.name,
            cell.axes,
            cell.words,
            group or sweep.path.name,
            sweep,
            target,
            read_start(cell.name, words),
        )
        for cell in lost
    ]
    for item in frozen:
        shutil.rmtree(sweep.run(item.cell).path, ignore_errors=True)
    write_cells(sweep, frozen)
    names = {item.cell.name: item.cell for item in frozen}
    cells = [names.get(cell.name, cell) for cell in sweep.read_cells()]
    write_atomically(sweep.manifest, "".join(cell.line() for cell in cells))
    return list(names)
