"""NAME=VALUE words of commands that have a few settings of their own, which are no keys of a config."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rcpo.commands.flags import Flags
from rcpo.common.errors import UserError, shortened
from rcpo.evaluation.engines import ENGINES, TRANSFORMERS

_WORD = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Setting:
    """One that a command has."""

    name: str
    text: str
    """For the help."""
    read: Callable[[str], Any] = str
    """Raises ValueError with the rule for a value that is wrong."""
    default: Any = None
    offered: tuple[str, ...] = ()
    """Its values, where there are few; else files are offered."""


def whole_number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) < least:
            raise ValueError(f"must be a whole number of at least {least}")
        return int(text)

    return read


def number_in(least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise ValueError(f"must be a number from {least:g} to {most:g}")
        return value

    return read


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            close = difflib.get_close_matches(text, names, n=1)
            raise ValueError(f"did you mean {close[0]}?" if close else f"choose one of {', '.join(names)}")
        return text

    return read


def names(text: str) -> list[str]:
    """Of a list with commas."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ValueError("must be names with commas between them")
    return list(dict.fromkeys(found))


def yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("must be yes or no")
    return text == "yes"


ENGINE = Setting(
    "engine",
    "what runs the model: transformers (default), or vllm where it is installed",
    one_of(ENGINES),
    TRANSFORMERS,
    ENGINES,
)


def add_settings(parser: Flags, settings: Sequence[Setting], places: str) -> None:
    """Words of a command: `places`, such as RUN|MODEL, and settings, in any order."""
    action = parser.add_argument("words", nargs="+", metavar=places, help="and settings, in any order")
    action.settings = settings  # type: ignore[attr-defined]  # for TAB
    parser.usage = f"%(prog)s {places} NAME=VALUE ..."
    parser.epilog = f"settings:\n{setting_lines(settings)}\n\n" + (parser.epilog or "")


def setting_lines(settings: Sequence[Setting]) -> str:
    """For the help."""
    return "\n".join(f"  {setting.name}=".ljust(20) + setting.text for setting in settings)


def split_words(words: Sequence[str], settings: Sequence[Setting]) -> tuple[list[str], argparse.Namespace]:
    """(places, values of all settings). Raises UserError for a setting that is not known, twice there or
    wrong."""
    known = {setting.name: setting for setting in settings}
    values = {setting.name: setting.default for setting in settings}
    places, seen = [], set()
    for word in words:
        match = _WORD.fullmatch(word)
        if match is None:
            places.append(word)
            continue
        name, value = match.groups()
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}=...?" if close else f"choose one of {', '.join(known)}"
            raise UserError(f"{shortened(word)}: no such setting; {hint}")
        if name in seen:
            raise UserError(f"{shortened(word)}: {name} is there twice; leave one out")
        seen.add(name)
        try:
            values[name] = known[name].read(value)
        except ValueError as error:
            raise UserError(f"{shortened(word)}: {error}; type {name}=VALUE") from None
    return places, argparse.Namespace(**values)
