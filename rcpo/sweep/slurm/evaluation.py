"""The evaluation of a sweep's cells on SLURM: an array of its own, whose tasks wait for those that train.

One process and, where the profile has GPUs, one GPU a cell. A cell's task starts when the task that trains
the cell has ended well (`--dependency=aftercorr`), and never when that has failed.
SWEEP/evaluation-slurm.json remembers what was submitted; what was asked stands in SWEEP/evaluate.sbatch, and
what each cell's evaluation said in SWEEP/logs/evaluation/. Called by `rcpo evaluate SWEEP --slurm`, with
the sweep's lock held."""

import dataclasses
import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically
from rcpo.runs.folder import now
from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.slurm import submit as training
from rcpo.sweep.slurm.queue import DEFAULT_MAX_ARRAY_SIZE, Job, jobs_of, live_jobs, max_array_size, said_by
from rcpo.sweep.slurm.script import (
    COMMENT,
    Chunk,
    chunks_of,
    filled,
    machine_options,
    safe_name,
)
from rcpo.sweep.slurm.states import Attempt, last_attempt
from rcpo.sweep.slurm.submit import cells_text, sweep_id
from rcpo.sweep.states import State, read_status

if TYPE_CHECKING:
    from rcpo.sweep.slurm.profile import Profile

KEYS = ("job", "id", "first", "array", "after", "words", "time")
"""Of an array that was submitted."""


def record_of(sweep: SweepFolder) -> Path:
    """What was submitted; there is none where no evaluation of the sweep was."""
    return sweep.path / "evaluation-slurm.json"


def submit(sweep: SweepFolder, profile: str, max_parallel: int | None, words: Sequence[str]) -> int:
    """Write the batch script and submit the cells that are trained, or that SLURM trains or will; returns
    the exit code. `words` are settings and flags of `rcpo evaluate`."""
    checked, cells = _profile(profile), sweep.read_cells()
    script, limit = script_of(sweep, profile, max_parallel, words), checked.throttle(max_parallel)
    evaluation_id = _id(sweep, words)
    known = jobs_of(evaluation_id, _arrays(sweep, evaluation_id))
    training_jobs = training.jobs_of_sweep(sweep) if sweep.slurm.is_file() else {}
    ready: list[int] = []
    after: dict[str, list[int]] = {}
    left = Counter[str]()
    for idx, cell in enumerate(cells):
        job = training_jobs.get(idx)
        if idx in known and known[idx].is_live:
            left["queued or running"] += 1
        elif read_status(sweep, cell, {}).state is State.DONE:
            ready.append(idx)
        elif job is not None and job.is_live:
            after.setdefault(job.array, []).append(idx)
        else:
            left["not trained, and not queued to be"] += 1
    if not ready and not after and not left["queued or running"]:
        raise UserError(
            f"{sweep.path}: no cell is trained or queued to be; type `rcpo resume {sweep.path}` first"
        )
    chunks = [(chunk, None) for chunk in chunks_of(ready, checked.max_array_size or max_array_size())]
    # The same index as the task that trains the cell: that is what aftercorr goes by.
    firsts = {array: members[0] - training_jobs[members[0]].index for array, members in after.items()}
    later = [(Chunk(firsts[array], members), array) for array, members in after.items()]
    sweep.logs.mkdir(exist_ok=True)
    write_atomically(sweep.path / "array.txt", "".join(f"{cell.name}\n" for cell in cells))
    write_atomically(sweep.path / "evaluate.sbatch", script)
    _submit(sweep, evaluation_id, [*chunks, *later], limit, words)
    if left:
        print(f"left alone: {', '.join(f'{count} {what}' for what, count in left.items())}")
    print(f"`rcpo status {sweep.path}` says how far they are")
    return 0


def _submit(
    sweep: SweepFolder,
    evaluation_id: str,
    chunks: Sequence[tuple[Chunk, str | None]],
    limit: int | None,
    words: Sequence[str],
) -> None:
    """Each chunk as an array; where it has one, after the array that trains its cells."""
    previous = None
    for chunk, trainer in chunks:
        waits = [] if trainer is None else [f"aftercorr:{trainer}"]
        if previous is not None and limit is not None:
            waits.append(f"afterany:{previous}")  # a throttle is of one array
        command = ["sbatch", "--parsable", f"--array={chunk.array(limit)}"]
        command.append(f"--comment={COMMENT}:{evaluation_id}:{chunk.first}")
        if waits:
            command += [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"]
        said = said_by([*command, str(sweep.path / "evaluate.sbatch"), str(chunk.first)])
        previous = said.strip().split(";")[0]
        _remember(
            sweep, {"job": previous, "id": evaluation_id, "first": chunk.first, "array": chunk.array(None),
                    "after": trainer, "words": list(words), "time": now()}
        )  # fmt: skip
        when = "" if trainer is None else f", each after its training in job {trainer}"
        print(f"submitted the evaluation of {cells_text(len(chunk.indices))} as job {previous}{when}")


def script_of(sweep: SweepFolder, profile: str, max_parallel: int | None, words: Sequence[str]) -> str:
    """The batch script that `submit` would write; nothing is written, and SLURM need not be here."""
    if bad := next((word for word in words if re.search(r"[\x00-\x1f\x7f]", word)), None):
        raise UserError(f"{bad!r}: a word with control characters cannot be used on SLURM; leave them out")
    checked = _profile(profile)
    size = checked.max_array_size or DEFAULT_MAX_ARRAY_SIZE
    first = chunks_of(range(len(sweep.read_cells())), size)[0]
    options = [
        *checked.sbatch,
        f"--job-name=rcpo-evaluate-{safe_name(sweep)}",
        f"--array={first.array(checked.throttle(max_parallel))}",
        f"--comment={COMMENT}:{_id(sweep, words)}:{first.first}",
        *machine_options(checked),
        "--requeue",
    ]
    places = {
        "SBATCH": "\n".join(f"#SBATCH {option}" for option in options),
        "WORDS": shlex.join(words) or "evaluation=word_problems",
    }
    return filled("evaluate.sbatch", checked, sweep, Path.cwd(), places)


def _profile(name: str) -> "Profile":
    """One process of the profile's machines."""
    from rcpo.sweep.slurm.profile import read_profile  # with pydantic and Hydra, which states need not

    profile = read_profile(name)
    gpus = None if profile.gpus_per_node is None else 1
    return dataclasses.replace(profile, nodes=1, gpus_per_node=gpus, processes=None)


def _id(sweep: SweepFolder, words: Sequence[str]) -> str:
    """What the jobs that evaluate this sweep with these words are known by."""
    digest = hashlib.sha256("\0".join(sorted(words)).encode()).hexdigest()
    return f"{sweep_id(sweep)}-{digest[:8]}"


def read_record(sweep: SweepFolder) -> list[dict[str, Any]]:
    """The arrays that were submitted, in their order."""
    path = record_of(sweep)
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["submissions"]
        return [{key: item[key] for key in KEYS} for item in found]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: is damaged; remove it (SLURM still knows the jobs)") from None


def _remember(sweep: SweepFolder, submission: dict[str, Any]) -> None:
    tree = {"submissions": [*read_record(sweep), submission]}
    write_atomically(record_of(sweep), json.dumps(tree, indent=2) + "\n")


def _arrays(sweep: SweepFolder, evaluation_id: str) -> dict[str, int]:
    """Job id of each array of these words, and the index of its first cell."""
    return {item["job"]: item["first"] for item in read_record(sweep) if item["id"] == evaluation_id}


def jobs_that_live(sweep: SweepFolder) -> list[Job]:
    """All jobs that evaluate cells of the sweep, or will."""
    ids = dict.fromkeys(item["id"] for item in read_record(sweep))
    return [job for each in ids for job in live_jobs(each, _arrays(sweep, each))]


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A cell of the sweep whose evaluation was submitted."""

    cell: str
    state: str
    """running, queued, done, failed, or stopped before it could end."""
    reason: str | None


def read_evaluated(sweep: SweepFolder) -> list[Evaluated]:
    """What became of the evaluations that were submitted, in the order of the manifest; empty where none
    was."""
    record = read_record(sweep)
    if not record:
        return []
    newest = {item["first"] + offset: item["time"] for item in record for offset in _offsets(item["array"])}
    live = {job.cell: job for job in jobs_that_live(sweep)}
    names = dict(enumerate(cell.name for cell in sweep.read_cells()))
    return [_evaluated(sweep, names[idx], newest[idx], live.get(idx)) for idx in sorted(newest)]


def _offsets(array: str) -> list[int]:
    """Of --array: 0-3,7."""
    ends = [part.partition("-") for part in array.split(",")]
    return [number for low, _, high in ends for number in range(int(low), int(high or low) + 1)]


def _evaluated(sweep: SweepFolder, name: str, submitted: str, job: Job | None) -> Evaluated:
    if job is not None:
        return Evaluated(name, "queued" if job.waits else "running", f"job {job.id}")
    log = sweep.logs / "evaluation" / f"{name}.log"
    if not log.is_file() or log.stat().st_mtime < datetime.fromisoformat(submitted).timestamp():
        return Evaluated(name, "not started", "its training did not end well, or it was cancelled")
    return _of_log(name, last_attempt(log))


def _of_log(name: str, attempt: Attempt) -> Evaluated:
    if attempt.ending == "done":
        return Evaluated(name, "done", None)
    if attempt.ending is None:
        return Evaluated(name, "stopped", "type the same `rcpo evaluate` again to go on")
    return Evaluated(name, "failed", attempt.last_words() or attempt.ending)


def evaluated_lines(evaluated: Sequence[Evaluated]) -> list[str]:
    """How many are in which state, and why some are not done."""
    counts = Counter(each.state for each in evaluated)
    shown = ", ".join(f"{count} {state}" for state, count in counts.items())
    told = [f"evaluation of {each.cell}: {each.state}: {each.reason}" for each in evaluated
            if each.state in ("failed", "stopped", "not started")]  # fmt: skip
    return [*told, f"evaluation of {cells_text(len(evaluated))}: {shown}"] if evaluated else []
