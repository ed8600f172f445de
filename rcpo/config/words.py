"""The words of `rcpo train` before Hydra reads them: rcpo's own spellings, objectives of a user's own, and
what to type for a grid. Called by `rcpo.config.compose`; imports no torch."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rcpo.common.installed import OBJECTIVES, names_in

OPEN = ("deepspeed.extra", "data.columns", "data.mix", "model.chat_template_kwargs")
"""Keys whose own keys are not known beforehand, and so need no + on the command line."""
SLICED = ("data.path", "data.eval_path", "data.split", "data.eval_split")
"""Keys whose values may hold brackets that are no list: 'train[:10%]', 'part-[0-9].jsonl'."""
COMPARED = ("train.stop_when",)
"""Keys whose values hold signs that Hydra reads in quotes alone."""
MULTIRUN = ("-m", "--multirun")
PLACED = ("name", "run_dir")
"""Keys that every cell of a sweep gets from its place."""


def hydra_words(argv: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The words as Hydra spells them; `folders` hold the options of groups.

    calibration=true and =false mean on and off, which is what YAML 1.1 makes of them elsewhere.
    objective=NAME of an objective that has no file in `folders` (`own_objective`) chooses no option and sets
    objective.name; its parameters, which no file lists, need no +. A slice and a condition
    need no quotes of their own.
    """
    own = own_objective(argv, folders)
    words = [] if own is None else ["~objective", f"++objective.name={own}"]
    for word in argv:
        key, equals, value = word.partition("=")
        if own is not None and equals and key.lstrip("+") in ("objective", "objective.name"):
            continue
        if key == "calibration" and value.lower() in ("true", "false"):
            words.append(f"calibration={'on' if value.lower() == 'true' else 'off'}")
        elif key.split(".")[:2] in [name.split(".") for name in OPEN] or (
            own is not None and key.startswith("objective.")
        ):
            words.append(f"++{word}")
        elif _lacks_quotes(key.lstrip("+"), value):
            words.append(f'{key}="{value}"')
        else:
            words.append(word)
    return words


def _lacks_quotes(key: str, value: str) -> bool:
    """Whether the value is one that Hydra reads in quotes alone, and has none."""
    if key in SLICED:
        return re.match(r"""[^\['"]+\[""", value) is not None
    return key in COMPARED and re.match(r"""[^'"]*[<>=]""", value) is not None


def own_objective(argv: Sequence[str], folders: Sequence[Path]) -> str | None:
    """The name of an objective of a user's own that the words ask for, by objective=NAME or
    objective.name=NAME; None where they ask for one that has a YAML file."""
    pairs = (word.lstrip("+").split("=", 1) for word in argv if "=" in word)
    given = {key: value.strip("'\"") for key, value in pairs}
    name = given.get("objective", given.get("objective.name"))
    if (
        name is None
        or not re.fullmatch(r"[\w.-]+", name)
        or ("objective" not in given and "experiment" in given)
    ):
        return None
    if any((folder / "objective" / f"{name}.yaml").is_file() for folder in folders):
        return None
    registry = sys.modules.get("rcpo.objectives.registry")  # torch comes with it, so it is not imported here
    is_registered = registry is not None and name in registry.OWN
    return name if "objective.module" in given or is_registered or name in names_in(OBJECTIVES) else None


def placed_module(section: Any, folders: Sequence[Path]) -> None:
    """Make the file in objective.module an absolute path where it lies in one of `folders`: a run that is
    resumed from another folder finds it."""
    named = section.get("module") if isinstance(section, dict) else None
    if isinstance(named, str) and named.endswith(".py"):
        files = (folder / Path(named).expanduser() for folder in folders)
        section["module"] = next((str(file.absolute()) for file in files if file.is_file()), named)


def grid_line(argv: Sequence[str]) -> str:
    """The one line for words that ask for several runs: a sweep file for them, and what to type."""
    axes: dict[str, str] = {}
    others = []
    flag = next((word for word in argv if word in MULTIRUN), None)
    for word in argv:
        key = word.split("=")[0]
        values = _values(word)
        if values is not None:
            axes[key.lstrip("+")] = f"[{', '.join(_in_yaml(value) for value in values)}]"
        elif "=" in word and not word.startswith("-") and key not in PLACED:
            others.append(word)
    if not axes:
        return f"{flag}: `rcpo train` makes one run; leave it out, or type rcpo sweep FILE for a grid"
    first = next(word for word in argv if _values(word) is not None)
    seen = f"{first}: is several values;" if flag is None else f"{flag}:"
    line = ", ".join(f"{key}: {values}" for key, values in axes.items())
    return (
        f"{seen} `rcpo train` makes one run; for all of them write grid.yaml with the line "
        f"axes: {{{line}}} and type {shlex.join(['rcpo', 'sweep', 'grid.yaml', *others])}"
    )


def _values(word: str) -> list[str] | None:
    """The values that a word sweeps over, as Hydra's multirun would; None where it is one value."""
    if "=" not in word or word.startswith("-"):
        return None
    try:
        parsed = OverridesParser.create().parse_override(word)
        return list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else None
    except (HydraException, OmegaConfBaseException, NotImplementedError):
        return None


def _in_yaml(value: str) -> str:
    """A value inside a list in one line of YAML."""
    return value if re.fullmatch(r"[\w.+/-]+", value) else "'" + value.replace("'", "''") + "'"
