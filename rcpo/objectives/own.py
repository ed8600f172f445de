"""Objectives from a user's own file or module, which a config names: objective.module=my_losses.py.

Owns finding, importing and importing again, and the one-line errors about that. Runs no code that no config
names. Called by `rcpo.objectives.composition` for every config, so that started ranks, resumed runs and the
cells of a sweep import it too.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rcpo.common.errors import UserError, shortened
from rcpo.objectives.registry import OWN, Entry

KEY = "objective.module"


@dataclass(frozen=True)
class OwnModule:
    """A user's module as this process has imported it."""

    entries: dict[str, Entry]
    """The objectives that it registers, by name."""
    file: Path | None
    """Its source; None where it has none."""
    digest: str | None
    """SHA-256 of the source when it was imported."""


_imported: dict[str, OwnModule] = {}
"""By the file's absolute path, or the module's dotted name."""


def is_file_name(named: str) -> bool:
    """Whether objective.module names a file rather than a module."""
    return named.endswith(".py") or os.sep in named


def import_own(named: str, fresh: bool = False) -> OwnModule:
    """Import the module and register what it registers; once in a process, but with `fresh` again where its
    file has changed. A run that trains keeps what it started with.

    Raises UserError where there is no such module, it cannot be imported, or it registers no objective.
    """
    if not isinstance(named, str) or not named.strip():
        raise UserError(f"{KEY}={named}: names no module; type {KEY}=FILE.py")
    file = Path(named).expanduser().absolute() if is_file_name(named) else None
    key = named if file is None else str(file)
    known = _imported.get(key)
    if known is None or (fresh and file is not None and _digest_of(file, named) != known.digest):
        known = _imported[key] = _import(named, file)
    # Another module may have registered the same names since.
    OWN.update(known.entries)
    return known


def _import(named: str, file: Path | None) -> OwnModule:
    before = dict(OWN)
    digest = None if file is None else _digest_of(file, named)
    try:
        module = importlib.import_module(named) if file is None else _module_of(file, str(digest))
    except UserError:
        raise
    # Somebody else's code: anything can go wrong in it, exit() included.
    except (Exception, SystemExit) as error:
        raise UserError(f"{KEY}={shortened(named)}: {_reason(named, file, error)}") from None
    if file is None and getattr(module, "__file__", None):
        file = Path(str(module.__file__))
        with contextlib.suppress(UserError):
            digest = _digest_of(file, named)
    entries = {
        name: entry for name, entry in OWN.items()
        if before.get(name) is not entry or f"{entry.loss.__module__}.".startswith(f"{module.__name__}.")
    }  # fmt: skip
    if not entries:
        raise UserError(
            f"{KEY}={shortened(named)}: registers no objective; decorate a function of it with "
            '@rcpo.objectives.register("NAME", needs_reference=True)'
        )
    return OwnModule(entries, file, digest)


def _digest_of(file: Path, named: str) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"{KEY}={shortened(named)}: cannot be read ({error.strerror}); type {KEY}=FILE.py"
        ) from None


def _module_of(file: Path, digest: str) -> ModuleType:
    """Execute the file as a module of a name of its own, with its folder on the path: it may import its
    neighbours."""
    stem = re.sub(r"\W", "_", file.stem)
    name = f"rcpo_own_{stem}_{hashlib.sha256(f'{file} {digest}'.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        with _folder_on_path(file.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _folder_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _reason(named: str, file: Path | None, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and f"{named}.".startswith(f"{error.name}."):
        return f"there is no such module; type {KEY}=FILE.py, or install the package that has it"
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if file is not None and frame.filename == str(file):
            line = frame.lineno
    where = "" if line is None else f"line {line}: "
    said = error.msg if isinstance(error, SyntaxError) else error
    return f"cannot be imported ({where}{type(error).__name__}: {' '.join(str(said).split())[:200]}); mend it"
