"""`rcpo train --overwrite`: the new run takes the place of an old one, and nothing else is ever replaced.

The old run folder stands until everything about the new run has been checked; it is gone once the new folder
is there. Called by `rcpo.launch.start`.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rcpo.common.errors import UserError
from rcpo.common.locks import HeldError, hold, is_held, read_holder, run_lock
from rcpo.config.resolved import ResolvedConfig
from rcpo.records.places import spelled_out

INSTEAD = "type another name=... or run_dir=..."


def refuse_irreplaceable(config: ResolvedConfig) -> None:
    """Raise UserError when what is at the run folder's place is no run folder, is being trained, or is what
    the new run reads. An empty folder, or none, is fine."""
    path = Path(config.run_dir)
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise UserError(f"run_dir={path}: --overwrite replaces run folders only, and it is none; {INSTEAD}")
    if any(path.iterdir()) and not ((path / "config.yaml").is_file() and (path / "run.json").is_file()):
        raise UserError(
            f"run_dir={path}: --overwrite replaces run folders only, and it lacks config.yaml and run.json; "
            f"{INSTEAD}"
        )
    reads = {
        "objective.module": config.objective.get("module"),
        "model.path": config.model.path,
        "model.lora.adapter": config.model.lora.adapter,
        "model.chat_template": config.model.chat_template,
        "data.filter.scores": config.data.filter.scores,
    }
    data = [("data.path", path) for path in config.data.train_paths()]
    data += [("data.eval_path", path) for path in config.data.eval_paths()]
    files = [(key, file) for key, path in data for file in (path, *spelled_out(path))]
    for key, value in [*reads.items(), *files]:
        if value is not None and Path(value).resolve().is_relative_to(path.resolve()):
            raise UserError(f"run_dir={path}: --overwrite would remove {key}={value}; {INSTEAD}")
    if is_held(run_lock(path)):
        raise _is_trained(path, HeldError(read_holder(run_lock(path))))


@contextlib.contextmanager
def old_set_aside(path: Path) -> Iterator[None]:
    """While open, the run folder at `path`, if there is one, stands beside as .NAME.replaced; then it is
    removed, or put back where what happens inside raises."""
    if not path.is_dir() or not any(path.iterdir()):
        yield
        return
    beside = path.with_name(f".{path.name}.replaced")
    with run_lock_held(path):
        shutil.rmtree(beside, ignore_errors=True)
        path.rename(beside)
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
        raise
    shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def run_lock_held(path: Path) -> Iterator[None]:
    """While open, this process trains the run at `path` and no other one does. Raises UserError when another
    does already."""
    if not (path / "config.yaml").is_file():
        yield
        return
    lock = run_lock(path)
    try:
        with hold(lock):
            yield
    except HeldError as error:
        raise _is_trained(path, error) from None


def _is_trained(path: Path, error: HeldError) -> UserError:
    return UserError(f"run_dir={path}: is being trained by {error}; stop that one first, or {INSTEAD}")
