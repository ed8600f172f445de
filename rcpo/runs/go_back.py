"""`rcpo resume RUN --from STEP`: an earlier checkpoint becomes the newest one. Loads no torch."""

from pathlib import Path

from rcpo.common.errors import UserError
from rcpo.runs.folder import RunFolder

ASIDE = "aside-"
"""Before the name of a checkpoint that no resumption looks at."""


def set_newer_aside(run: RunFolder, step: str) -> dict[Path, Path]:
    """Rename the checkpoints that are newer than the one of `step` (100 or step-000100), and return their new
    places by the old ones. Raises UserError where there is none of that step; then nothing is renamed."""
    number = step.rstrip("/").rsplit("/", 1)[-1].removeprefix("step-")
    known = {path.name: path for path in sorted(run.checkpoints.glob("step-*"))}
    wanted = f"step-{int(number):06d}" if number.isascii() and number.isdecimal() else step
    if wanted not in known or not (known[wanted] / "manifest.json").is_file():
        there = ", ".join(known) or "none: train with train.save_every=N to write some"
        raise UserError(f"--from {step}: {run.path} has no such checkpoint; there are {there}; type one")
    moved = {}
    for name, path in known.items():
        if int(name.removeprefix("step-")) > int(number):
            number_aside = 0
            while (place := path.with_name(f"{ASIDE}{name}-{number_aside}")).exists():
                number_aside += 1
            moved[path] = path.rename(place)
    return moved


def put_back(moved: dict[Path, Path]) -> None:
    """Undo `set_newer_aside`, where a run was refused before it wrote checkpoints of these steps."""
    for path, place in moved.items():
        if not path.exists():
            place.rename(path)
