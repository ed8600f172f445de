"""A grid from the words of `rcpo train -m`: objective=dpo,simpo 'seed=range(3)' are axes, as of a sweep file.

Owns which sweep that is: its folder is named after the axes and, by a digest, after all other words, so that
the same words find the same folder again, and more values make it grow. Hydra's own grammar reads the words;
what its launchers and sweepers are for, `rcpo sweep` does.
"""

import hashlib
import json
import re
from collections.abc import Sequence

from rcpo.common.errors import UserError, shortened
from rcpo.config.compose import config_dirs, look_at
from rcpo.config.refused import refuse_words
from rcpo.config.words import values_of
from rcpo.sweep.definition import Definition, definition_of

DIGEST_LETTERS = 6
SPELT = {"calibration": {"true": "on", "false": "off"}}
"""Values as a config file has them, which YAML 1.1 would take for others."""


def definition_of_words(argv: Sequence[str]) -> Definition:
    """The sweep that these words of `rcpo train` make, --config-dir among them. Raises UserError."""
    refuse_words(argv)
    folders = [
        word for folder in config_dirs(list(argv)) for word in ("--config-dir", str(folder.absolute()))
    ]
    axes: dict[str, list[str]] = {}
    fixed, name = list[str](), None
    for word in (word for word in argv if "=" in word and not word.startswith("-")):
        key, _, value = word.partition("=")
        values = _values(word, folders)
        if key in ("name", "run_dir"):
            name = _name_of(key, word, value, values)
        elif values is None:
            fixed.append(word)
        elif key in axes:
            raise UserError(f"{shortened(word)}: {key} is there twice; give all its values in one word")
        else:
            axes[key] = values
    if not axes:
        raise UserError(
            "-m: makes a run of each combination of values, and no word here has several; type for example "
            "objective=dpo,simpo or 'seed=range(3)', or leave -m out"
        )
    tree = {"name": name or _named_after(list(axes), [*folders, *fixed]), "axes": axes}
    return definition_of(tree, "train", [*folders, *fixed])


def _values(word: str, folders: Sequence[str]) -> list[str] | None:
    """The values of a word that has several; UserError where none or one is there twice."""

    def options_of(group: str) -> list[str]:
        return look_at(list(folders)).options.get(group, [])

    values = values_of(word, options_of)
    if values is None:
        return None
    spelt = SPELT.get(word.partition("=")[0], {})
    values = [spelt.get(value.lower(), value) for value in values]
    if not values:
        raise UserError(f"{shortened(word)}: is no value at all; give at least one")
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise UserError(f"{shortened(word)}: {twice} is there twice; give it once")
    return values


def _name_of(key: str, word: str, value: str, values: list[str] | None) -> str:
    """The sweep's name, from name=NAME."""
    if key == "run_dir":
        raise UserError(f"{shortened(word)}: is the folder of one run; type --out FOLDER for all of them")
    if values is not None:
        raise UserError(f"{shortened(word)}: names one sweep, its runs name themselves; give one name")
    return value.strip("'\"")


def _named_after(axes: Sequence[str], others: Sequence[str]) -> str:
    """Keys of the axes, and a digest of all other words where there are any."""
    parts = [re.split(r"[./@]", axis)[-1] for axis in axes]
    if others:
        digest = hashlib.sha256(json.dumps(sorted(others)).encode()).hexdigest()
        parts.append(digest[:DIGEST_LETTERS])
    return "-".join(parts)[:100].strip("+-_.")
