"""The words of `rcpo train` before Hydra reads them: rcpo's own spellings, objectives of a user's own, and
what to type for a grid. Called by `rcpo.config.compose`; imports no torch."""

import itertools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, ValueType
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rcpo.common.errors import UserError, shortened
from rcpo.common.installed import OBJECTIVES, names_in

OPEN = ("deepspeed.extra", "data.columns", "data.mix", "model.chat_template_kwargs")
"""Keys whose own keys are not known beforehand, and so need no + on the command line."""
SLICED = ("data.path", "data.eval_path", "data.split", "data.eval_split")
"""Keys whose values may hold brackets that are no list: 'train[:10%]', 'part-[0-9].jsonl'."""
COMPARED = ("train.stop_when",)
"""Keys whose values hold signs that Hydra reads in quotes alone."""
MULTIRUN = ("-m", "--multirun")
MOST_VALUES = 1000
"""Of one word."""


def hydra_words(argv: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The words as Hydra spells them; `folders` hold the options of groups.

    calibration=true and =false mean on and off, which is what YAML 1.1 makes of them elsewhere.
    train.evaluate=NAME and evaluation=NAME mean both.
    objective=NAME of an objective that has no file in `folders` (`own_objective`) chooses no option and sets
    objective.name; its parameters, which no file lists, need no +. A slice and a condition
    need no quotes of their own.
    """
    own = own_objective(argv, folders)
    words = [] if own is None else ["~objective", f"++objective.name={own}"]
    words += _both_of_evaluate(argv)
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


def _both_of_evaluate(argv: Sequence[str]) -> list[str]:
    """evaluation=NAME for train.evaluate=NAME and the other way round, where the words say one of the two."""
    given = {key.lstrip("+"): value.strip("'\"") for key, _, value in (word.partition("=") for word in argv)}
    pair = ("train.evaluate", "evaluation")
    missing = [key for key in pair if key not in given]
    name = given.get("train.evaluate", given.get("evaluation", ""))
    is_name = re.fullmatch(r"[\w.-]+", name) is not None and name != "null"
    return [f"{missing[0]}={name}"] if is_name and len(missing) == 1 else []


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
    """The one line for words that ask for several runs, where one is made: what to type for all of them."""
    flag = next((word for word in argv if word in MULTIRUN), None)
    first = next((word for word in argv if values_of(word) is not None), None)
    if first is None:
        return f"{flag}: is for several values of a key, as in objective=dpo,simpo; leave it out"
    words = [word for word in argv if word not in MULTIRUN]
    typed = shlex.join(["rcpo", "train", "-m", *words])
    return f"{first}: is several values, and this is one run; for a run of each type {typed}"


def values_of(word: str, options_of: Callable[[str], list[str]] | None = None) -> list[str] | None:
    """The values that a word sweeps over, as Hydra's multirun would; None where it is one value. `options_of`
    gives a group's options, for glob(*). Raises UserError for what is no list of values."""
    if "=" not in word or word.startswith("-"):
        return None
    try:
        parsed = OverridesParser.create().parse_override(word)
        if not parsed.is_sweep_override():
            return None
        if parsed.value_type is ValueType.GLOB_CHOICE_SWEEP:
            return [] if options_of is None else _matching(parsed, options_of)
        if not parsed.is_discrete_sweep():
            raise UserError(
                f"{shortened(word)}: is a range without steps, for a search; write it in a sweep file as "
                "{type: float, low: LOW, high: HIGH} and type rcpo sweep FILE --search optuna"
            )
        values = list(itertools.islice(parsed.sweep_string_iterator(), MOST_VALUES + 1))
    except (HydraException, OmegaConfBaseException, ValueError):
        return None
    if len(values) > MOST_VALUES:
        raise UserError(f"{shortened(word)}: is more than {MOST_VALUES} values; give fewer")
    return values


def _matching(parsed: Override, options_of: Callable[[str], list[str]]) -> list[str]:
    """The options of a group that glob(...) names."""
    value = parsed.value()
    assert isinstance(value, Glob)
    return value.filter(options_of(parsed.key_or_group))
