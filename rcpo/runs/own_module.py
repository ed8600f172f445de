"""The user's module of objectives in a run folder: a copy and its hash, and what has changed since.

RUN/config.yaml names the file (objective.module), and every rank imports it from there;
RUN/objective_module.py is a copy, for people and for when the file is lost. Does not import the module.
"""

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError

COPY = "objective_module.py"


def keep_module(folder: Path, named: str | None) -> dict[str, Any]:
    """Copy the module's file into the run folder; returns what run.json says of it, nothing where there is no
    file."""
    file = _file_of(named)
    if file is None:
        return {}
    shutil.copyfile(file, folder / COPY)
    return {"objective_module": {"path": str(file), "sha256": _digest(file)}}


def module_change(folder: Path, known: dict[str, Any]) -> dict[str, Any]:
    """What run.json gets, and a warning, when a run goes on and its module has changed."""
    kept = known.get("objective_module")
    if not isinstance(kept, dict) or not Path(kept["path"]).is_file():
        return {}
    digest = _digest(Path(kept["path"]))
    if digest == kept["sha256"]:
        return {}
    print(
        f"rcpo: warning: {kept['path']} has changed since this run was made; as it was then: {folder / COPY}",
        file=sys.stderr,
        flush=True,
    )
    return {
        "objective_module": {**kept, "sha256": digest, "before": [*kept.get("before", []), kept["sha256"]]}
    }


def refuse_lost_module(folder: Path, tree: dict[str, Any]) -> None:
    """Raise UserError where a run's module is not at its place any more, and say where the copy is."""
    section = tree.get("objective")
    named = section.get("module") if isinstance(section, dict) else None
    if isinstance(named, str) and named.endswith(".py") and not Path(named).is_file():
        copy = folder / COPY
        where = f"put it back, from {copy} say" if copy.is_file() else "put it back"
        raise UserError(f"objective.module={named}: is not there any more; {where}")


def _file_of(named: str | None) -> Path | None:
    """The source of a module that this process has imported already, where it has one."""
    if named is None:
        return None
    file = named if named.endswith(".py") else getattr(sys.modules.get(named), "__file__", None)
    return Path(file) if file is not None and Path(file).is_file() else None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
