"""A sweep on SLURM: submit its cells as job arrays, ask for their states, submit again.

Owns what is submitted, and that nothing is there twice. SWEEP/slurm.json remembers how and what was
submitted, SWEEP/array.txt which cell an index means, SWEEP/submit.sbatch is all that a cell needs. Called by
the commands of the same names, with the sweep's lock held where something is submitted.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically
from rcpo.runs.folder import now
from rcpo.sweep.expand import Point, digest_of_axes
from rcpo.sweep.folder import Cell, SweepFolder
from rcpo.sweep.slurm.queue import (
    DEFAULT_MAX_ARRAY_SIZE,
    Job,
    jobs_of,
    live_jobs,
    max_array_size,
    said_by,
)
from rcpo.sweep.slurm.script import Script, chunks_of, sbatch_words
from rcpo.sweep.slurm.states import with_job
from rcpo.sweep.states import CellStatus, State, read_status

if TYPE_CHECKING:
    from rcpo.sweep.slurm.profile import SlurmTarget


def submit(sweep: SweepFolder, profile: str, max_parallel: int | None, names: Collection[str]) -> int:
    """Write the batch script and submit those of the cells `names` that are neither done nor queued; returns
    the exit code."""
    from rcpo.sweep.slurm.profile import read_profile  # with pydantic and Hydra, which states need not

    checked, cells = read_profile(profile), sweep.read_cells()
    max_parallel = checked.throttle(max_parallel)
    size = checked.max_array_size or max_array_size()
    keep_id(sweep)
    script = Script(
        sweep, sweep_id(sweep), checked, len(cells), max_parallel, size, Path.cwd()
    ).text()  # before anything is written
    sweep.logs.mkdir(exist_ok=True)
    write_atomically(sweep.path / "array.txt", "".join(f"{cell.name}\n" for cell in cells))
    write_atomically(sweep.submit, script)
    record = _read_record(sweep) | {
        "id": sweep_id(sweep),
        "profile": profile,
        "max_parallel": max_parallel,
        "max_array_size": size,
    }
    _write_record(sweep, record)
    return _submit_missing(sweep, names)


def script_of(sweep: SweepFolder, profile: str, max_parallel: int | None, cells: Sequence[Point]) -> str:
    """The batch script that `submit` would write of these cells; nothing is written, and SLURM need not be
    here."""
    from rcpo.sweep.slurm.profile import read_profile

    checked = read_profile(profile)
    size = checked.max_array_size or DEFAULT_MAX_ARRAY_SIZE
    if checked.max_array_size is None and shutil.which("scontrol") is not None:
        with contextlib.suppress(UserError):  # of a cluster that does not answer here
            size = max_array_size()
    known = sweep.read_cells() if sweep.manifest.is_file() else []
    there = {digest_of_axes(cell.axes) for cell in known}
    num_cells = len(known) + sum(digest_of_axes(point.axes) not in there for point in cells)
    own = sweep_id(sweep) if known else _new_id(sweep, cells[0].name)
    limit = checked.throttle(max_parallel)
    return Script(sweep, own, checked, num_cells, limit, size, Path.cwd()).text()


def target_of(sweep: SweepFolder) -> "SlurmTarget":
    """Where the cells of a sweep run that SLURM has. Raises UserError where its profile is gone."""
    from rcpo.sweep.slurm.profile import SlurmTarget, read_profile

    return SlurmTarget(read_profile(str(_read_record(sweep)["profile"])))


def resubmit(sweep: SweepFolder) -> int:
    """Submit the cells that are neither done nor queued once more, with the script that is there."""
    if not sweep.submit.is_file():
        raise UserError(f"{sweep.submit}: is gone; type `rcpo sweep FILE --slurm PROFILE` again to write it")
    return _submit_missing(sweep, {cell.name for cell in sweep.read_cells()})


def _submit_missing(sweep: SweepFolder, names: Collection[str]) -> int:
    record = _read_record(sweep)
    statuses = read_statuses(sweep)
    missing = [
        idx
        for idx, status in enumerate(statuses)
        if not status.queued and status.state is not State.DONE and status.cell.name in names
    ]
    jobs = {statuses[idx].cell.name: job.id for idx, job in jobs_of_sweep(sweep).items() if job.is_live}
    previous = None
    for start, indices in _in_order(statuses, missing):
        for chunk in chunks_of(indices, record["max_array_size"]):
            words = sbatch_words(sweep, sweep_id(sweep), chunk, record["max_parallel"])
            words.insert(1, "--parsable")
            waits = [] if start not in jobs else [f"afterok:{jobs[start]}"]
            if previous is not None and record["max_parallel"] is not None:
                waits.append(f"afterany:{previous}")  # a throttle is of one array
            if waits:
                words.insert(1, f"--dependency={','.join(waits)}")
            if start in jobs:  # or it would stand in the queue for ever where its start fails
                words.insert(1, "--kill-on-invalid-dep=yes")
            previous = said_by(words).strip().split(";")[0]
            submission = {"job": previous, "first": chunk.first, "array": chunk.array(None), "time": now()}
            record["submissions"] = [*record["submissions"], submission]
            _write_record(sweep, record)
            jobs |= {statuses[idx].cell.name: f"{previous}_{idx - chunk.first}" for idx in chunk.indices}
            behind = f", behind {start}" if start in jobs else ""
            print(f"submitted {cells_text(len(chunk.indices))} as job {previous}{behind}", flush=True)
    left = Counter(
        "done" if status.state is State.DONE else "queued or running"
        for idx, status in enumerate(statuses)
        if idx not in set(missing) and status.cell.name in names
    )
    if left:
        print(f"left alone: {', '.join(f'{count} {what}' for what, count in left.items())}")
    print(f"`rcpo status {sweep.path}` says how far they are")
    return 0


def _in_order(
    statuses: Sequence[CellStatus], missing: Sequence[int]
) -> Iterator[tuple[str | None, list[int]]]:
    """The cells to submit, by the cell that they start from, those that others start from before these."""
    groups: dict[tuple[int, str], list[int]] = {}
    for idx in missing:
        after = statuses[idx].cell.after
        groups.setdefault((len(after), after[0] if after else ""), []).append(idx)
    for (_, start), indices in sorted(groups.items()):
        yield start or None, indices


def read_statuses(sweep: SweepFolder) -> list[CellStatus]:
    """All cells now, in the order of the manifest."""
    jobs = jobs_of_sweep(sweep)
    return [_read_status(sweep, cell, jobs.get(idx)) for idx, cell in enumerate(sweep.read_cells())]


def jobs_of_sweep(sweep: SweepFolder) -> dict[int, Job]:
    """The newest job of each cell, by the cell's index in the manifest."""
    return jobs_of(sweep_id(sweep), _arrays(sweep))


def _read_status(sweep: SweepFolder, cell: Cell, job: Job | None) -> CellStatus:
    queue = {} if job is None or not job.is_live else {cell.name: job.entry()}
    return with_job(sweep, read_status(sweep, cell, queue), job)


def jobs_that_live(sweep: SweepFolder) -> Sequence[Job]:
    """All jobs that train cells of the sweep, or will."""
    return live_jobs(sweep_id(sweep), _arrays(sweep))


def sweep_id(sweep: SweepFolder) -> str:
    """What this sweep's jobs are known by: it stays when the sweep grows."""
    known = _read_record(sweep)
    if known["id"] is not None:
        return str(known["id"])
    if known["submissions"]:  # by an rcpo that did not write the id down
        digest = hashlib.sha256(os.fsencode(sweep.path.resolve()) + b"\0" + sweep.manifest.read_bytes())
        return digest.hexdigest()[:12]
    return _new_id(sweep, sweep.read_cells()[0].name)


def _new_id(sweep: SweepFolder, first: str) -> str:
    """From where the sweep is and its first cell, which stays the first one."""
    return hashlib.sha256(os.fsencode(sweep.path.resolve()) + b"\0" + first.encode()).hexdigest()[:12]


def keep_id(sweep: SweepFolder) -> None:
    """Write the id down where SLURM has jobs of this sweep; before its manifest changes."""
    if sweep.slurm.is_file():
        _write_record(sweep, _read_record(sweep) | {"id": sweep_id(sweep)})


def _arrays(sweep: SweepFolder) -> dict[str, int]:
    """Job id of each array that was submitted, and the index of its first cell."""
    return {item["job"]: item["first"] for item in _read_record(sweep)["submissions"]}


def _read_record(sweep: SweepFolder) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": None, "profile": None,
        "max_parallel": None, "max_array_size": DEFAULT_MAX_ARRAY_SIZE, "submissions": [],
    }  # fmt: skip
    with contextlib.suppress(FileNotFoundError):
        try:
            record |= json.loads(sweep.slurm.read_text(encoding="utf-8"))
        except (ValueError, TypeError):
            raise UserError(f"{sweep.slurm}: is damaged; remove it (SLURM still knows the jobs)") from None
    return record


def _write_record(sweep: SweepFolder, record: dict[str, Any]) -> None:
    write_atomically(sweep.slurm, json.dumps(record, indent=2) + "\n")


def cells_text(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"
