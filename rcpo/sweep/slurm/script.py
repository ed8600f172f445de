"""The batch scripts of a sweep: slurm/array.sbatch, and slurm/evaluate.sbatch, with their @PLACES@ filled in.

Owns quoting: what comes from the user stands in the script as one quoted word, or is a line that the user's
profile gives as shell. Submits nothing: `rcpo.sweep.slurm.submit` does.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import rcpo
from rcpo.common.errors import UserError
from rcpo.sweep.folder import SweepFolder

if TYPE_CHECKING:  # what reads profiles imports pydantic and Hydra; `rcpo status` needs neither
    from rcpo.sweep.slurm.profile import Profile

COMMENT = "rcpo"
"""First part of the comment that marks a sweep's jobs: rcpo:SWEEP_ID:INDEX_OF_FIRST_CELL."""


MODULE_THERE = """\
# `module` is a function of login shells, and this is none.
if ! type module >/dev/null 2>&1; then
    set +e
    before=$PATH
    for file in "${LMOD_PKG:-}/init/bash" "${MODULESHOME:-}/init/bash" \\
        /etc/profile.d/*{modules,lmod}.sh /etc/profile; do
        if [ -r "$file" ]; then . "$file"; fi
        if type module >/dev/null 2>&1; then break; fi
    done
    PATH=$before:$PATH
    set -e
    if ! type module >/dev/null 2>&1; then
        echo "module: no such command on this node; load what is needed in setup:"
        exit 1
    fi
fi"""
"""Shell that makes `module load` work."""


def template_path(name: str = "array.sbatch") -> Path:
    """slurm/NAME: inside the package (a wheel), else beside it (a source tree)."""
    package = Path(rcpo.__file__).resolve().parent
    for folder in (package / "slurm", package.parent / "slurm"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"no slurm/{name} beside or inside {package}; install rcpo again")


@dataclass(frozen=True)
class Chunk:
    """Cells of one array: all of whose indices count from `first`."""

    first: int
    indices: list[int]
    """Of cells, in the order of the manifest."""

    def array(self, max_parallel: int | None) -> str:
        """As --array takes it: 0-3,7%2."""
        parts = []
        for start, end in _ranges([index - self.first for index in self.indices]):
            parts.append(str(start) if start == end else f"{start}-{end}")
        return ",".join(parts) + ("" if max_parallel is None else f"%{max_parallel}")


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, each as its first and last."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def chunks_of(indices: Sequence[int], max_array_size: int) -> list[Chunk]:
    """Arrays that hold these cells; an array's indices lie below `max_array_size`."""
    firsts = sorted({index // max_array_size * max_array_size for index in indices})
    return [
        Chunk(first, [index for index in sorted(indices) if first <= index < first + max_array_size])
        for first in firsts
    ]


def sbatch_words(sweep: SweepFolder, sweep_id: str, chunk: Chunk, max_parallel: int | None) -> list[str]:
    """The command that submits a chunk, without what makes its output machine-readable."""
    return [
        "sbatch",
        f"--array={chunk.array(max_parallel)}",
        f"--comment={COMMENT}:{sweep_id}:{chunk.first}",
        str(sweep.submit),
        str(chunk.first),
    ]


@dataclass(frozen=True)
class Script:
    """What a batch script is made of."""

    sweep: SweepFolder
    sweep_id: str
    profile: "Profile"
    num_cells: int
    max_parallel: int | None
    max_array_size: int
    folder: Path
    """Where `rcpo sweep` was called."""

    def text(self) -> str:
        """The script. Raises UserError when a path cannot stand in it."""
        chunks = chunks_of(range(self.num_cells), self.max_array_size)
        places = {
            "RANKS": str(self.profile.ranks),
            "BY_HAND": "\n".join(f"#     {line}" for line in self._by_hand(chunks)),
            "SBATCH": "\n".join(f"#SBATCH {option}" for option in self._options(chunks[0])),
            "REQUEUE_LIMIT": str(self.profile.requeue_limit),
        }
        return filled("array.sbatch", self.profile, self.sweep, self.folder, places)

    def _by_hand(self, chunks: Sequence[Chunk]) -> Iterator[str]:
        if len(chunks) == 1:
            yield shlex.join(["sbatch", str(self.sweep.submit)])
        else:
            for chunk in chunks:
                yield shlex.join(sbatch_words(self.sweep, self.sweep_id, chunk, self.max_parallel))

    def _options(self, first: Chunk) -> Iterator[str]:
        """Options of sbatch; of two of a kind the later one counts."""
        profile = self.profile
        yield from profile.sbatch
        yield f"--job-name=rcpo-{safe_name(self.sweep)}"
        yield f"--array={first.array(self.max_parallel)}"
        yield f"--comment={COMMENT}:{self.sweep_id}:{first.first}"
        yield from machine_options(profile)
        yield "--requeue"
        yield f"--signal=B:USR2@{profile.signal_seconds}"


def machine_options(profile: "Profile") -> Iterator[str]:
    """Options of sbatch for what a job runs on."""
    for key in ("partition", "account", "qos", "constraint", "time", "mem"):
        if (value := getattr(profile, key)) is not None:
            yield f"--{key}={value}"
    yield f"--nodes={profile.nodes}"
    yield f"--ntasks-per-node={profile.ranks_per_node}"
    yield f"--cpus-per-task={profile.cpus_per_task}"
    if profile.gpus_per_node is not None and profile.gpu_request != "none":
        gpus = ":".join(filter(None, [profile.gpu_type, str(profile.gpus_per_node)]))
        yield f"--gres=gpu:{gpus}" if profile.gpu_request == "gres" else f"--gpus-per-node={gpus}"


def filled(template: str, profile: "Profile", sweep: SweepFolder, folder: Path, own: dict[str, str]) -> str:
    """A script of slurm/ with the places that all have, and its `own`. `folder` is where the command was
    called. Raises UserError when a path cannot stand in it."""
    for path in (sweep.path, folder):
        if re.search(r"[\x00-\x1f\x7f]", str(path)):
            raise UserError(
                f"{str(path)!r}: a path with control characters cannot be used on SLURM; type --out FOLDER"
            )
    python = profile.python or ("python" if profile.container else sys.executable)
    container = shlex.split(profile.container or "")
    places = {
        "NAME": safe_name(sweep),
        "SWEEP": shlex.quote(str(sweep.path)),
        "FOLDER": shlex.quote(str(folder)),
        "PYTHON": shlex.quote(python),
        "SETUP": "\n".join(_setup(profile)),
        "SRUN": shlex.join(["srun", "--kill-on-bad-exit=1", "--wait=0", *profile.srun, *container]),
    } | own
    text = template_path(template).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda match: places[match[1]], text)


def _setup(profile: "Profile") -> Iterator[str]:
    if profile.gpus_per_node is None:
        yield "export CUDA_VISIBLE_DEVICES=  # the ranks use CPUs, whatever the node has"
    if profile.modules:
        yield MODULE_THERE
        yield shlex.join(["module", "load", *profile.modules])
    yield from profile.setup


def safe_name(sweep: SweepFolder) -> str:
    """Its folder's name as it may stand in a comment or in an option."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", sweep.path.name)[:60]
