"""What a run is called, where it goes, and paths that hold from any folder. Loads no torch. Called by
`rcpo.config.resolve` and `rcpo.launch.first_look`."""

import glob
import itertools
import os
import re
from datetime import datetime
from pathlib import Path

from rcpo.common.errors import UserError, shortened
from rcpo.config.schema import Config

TINY = "builtin:tiny"
"""`model.path` of the model that ships with rcpo."""
TINY_VISION = "builtin:tiny_vision"
BUILTIN = (TINY, TINY_VISION)
"""Of that, and of the one that sees; each is the folder of `rcpo.builtin` of its name."""


def model_label(config: Config) -> str:
    """Short name of the model for names and tags."""
    return last_part(config.model.path)


def last_part(path: str) -> str:
    """Of a folder's path, a hub id or builtin:NAME."""
    return path.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]


def data_label(config: Config) -> str:
    """Short name of the data: arithmetic, shapes, or the last part of its path without suffixes and a glob's
    signs."""
    paths = config.data.train_paths()
    if not paths:
        return config.data.source
    *folders, name = paths[0].rstrip("/").split("/")
    last = re.sub(r"[*?\[\]]+", "", name.split(".", 1)[0]) or (folders or ["files"])[-1]
    return last if len(paths) == 1 else f"{last}-and-{len(paths) - 1}-more"


def default_name(config: Config) -> str:
    """OBJECTIVE-CALIBRATION-MODEL-DATE-TIME, safe as a file name."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", model_label(config))[:48]
    return f"{config.objective['name']}-{config.calibration.name}-{label}-{stamp}"


def check_name(name: str) -> None:
    """Raise UserError where `name` is not safe as a file name everywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(
            f"name={shortened(repr(name))}: must be 1 to 100 letters, digits, '.', '_' or '-', and start "
            "with a letter or digit; type for example name=dpo-on-1"
        )


def absolute_run_dir(given: str) -> str:
    """The run folder's absolute path. Raises UserError for one that no file system takes."""
    try:
        path = Path(given).expanduser().absolute()
        too_long = max(len(os.fsencode(part)) for part in path.parts) > 255 or len(os.fsencode(path)) > 4000
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"run_dir={shortened(given)}: is no path ({error}); type run_dir=FOLDER") from None
    if too_long:
        raise UserError(
            f"run_dir={shortened(given)}: a name in it is longer than 255 bytes, or all of it than 4000; "
            "type run_dir=FOLDER"
        )
    return str(path)


def absolute(path: str | None) -> str | None:
    """`path` as an absolute one where it names something on this machine, so that a run resumed from another
    folder finds it; else (a hub id, a wrong name) as it is."""
    if not path:
        return path
    try:
        local = Path(path).expanduser().absolute()
        return str(local) if local.exists() else path
    except (RuntimeError, OSError, ValueError):
        return path


def all_absolute(paths: str | list[str] | None) -> str | list[str] | None:
    if paths is None:
        return None
    return [absolute_glob(path) for path in paths] if isinstance(paths, list) else absolute_glob(paths)


def absolute_glob(path: str) -> str:
    """`path` as an absolute one; a glob where the folder before its first sign is there."""
    found = absolute(path) or path
    if found != path or not glob.has_magic(path):
        return found
    head = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(path).parts))
    return str(Path(absolute(str(head)) or head) / Path(path).relative_to(head))
