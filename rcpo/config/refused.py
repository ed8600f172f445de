"""Words that Hydra would take and rcpo does not: flags, removed keys, keys of Hydra's own, and words that are
no KEY=VALUE. Called by `rcpo.config.compose`; imports no torch.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rcpo.common.conf import conf_dir
from rcpo.common.errors import UserError, shortened

PRINTING = ("--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
"""Hydra's flags that print something and train nothing."""
FLAGS = (*PRINTING, "--package", "-p", "--resolve", "--config-dir", "-cd")
"""All flags. Hydra has others, which would move the run folder or compose something else."""
OF_CFG = ("--package", "-p", "--resolve")
"""Flags that say how --cfg prints."""
NONE_OF = {"tracking": "none", "calibration": "off"}
"""Groups that have an option for nothing."""
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")


def only_prints(argv: Sequence[str]) -> bool:
    """Whether these words ask for text instead of a run."""
    return any(word.split("=")[0] in PRINTING for word in argv)


def refuse_words(argv: Sequence[str]) -> None:
    """Raise UserError for what Hydra would take and rcpo does not."""
    values = _flag_values(argv)
    for number, word in enumerate(argv):
        name = word.lstrip("+").split("=")[0]
        flag = word.split("=")[0]
        if word.startswith("-") and flag not in FLAGS:
            raise UserError(f"{shortened(word)}: no such flag; `rcpo train --help` lists them")
        if flag in OF_CFG and not only_prints(argv):
            raise UserError(f"{flag}: says how --cfg prints; type --cfg job as well, or leave {flag} out")
        if word.startswith("~"):
            raise UserError(f"{shortened(word)}: {_in_place_of_removing(name.lstrip('~'))}")
        if re.match(r"hydra[./@]|hydra$", name):
            raise UserError(f"{shortened(word)}: {_in_place_of_hydra(name)}")
        if "=" not in word and not word.startswith("-") and number not in values:
            _refuse_file(word)


def without_printing(argv: Sequence[str]) -> list[str]:
    """The words without the flags that print, and their values."""
    with_value = {number for number, word in enumerate(argv) if word in (*PRINTING, "--package", "-p")}
    gone = with_value | {number + 1 for number in with_value}
    return [word for number, word in enumerate(argv) if number not in gone and word not in OF_CFG]


def _flag_values(argv: Sequence[str]) -> set[int]:
    """Which words are the value of the flag before them."""
    with_value = (*PRINTING, "--package", "-p", "--config-dir", "-cd")
    return {number + 1 for number, word in enumerate(argv) if word in with_value}


def _in_place_of_hydra(key: str) -> str:
    """What to type for a key of Hydra's own."""
    part = re.split(r"[./@]", key)[1:2]
    if part == ["launcher"]:
        return (
            "rcpo submits to SLURM itself; leave it out and type rcpo train -m ... --slurm PROFILE, or "
            "--parallel N for runs here"
        )
    if part == ["sweeper"]:
        return "rcpo makes grids itself; leave it out, and for a search type rcpo sweep FILE --search optuna"
    if part == ["sweep"]:
        return "rcpo makes the folder of -m itself; leave it out and type --out FOLDER"
    return "rcpo makes its run folder and logs itself; leave it out"


def _in_place_of_removing(key: str) -> str:
    """What to type for ~KEY, which removes nothing here."""
    rule = "nothing can be removed"
    if key == "experiment":
        return f"{rule}; leave it out: no experiment is chosen by itself"
    if (conf_dir() / key).is_dir():
        if key in NONE_OF:
            return f"{rule}; type {key}={NONE_OF[key]}"
        options = sorted(path.stem for path in (conf_dir() / key).glob("*.yaml"))
        return f"{rule}; choose another option with {key}=OPTION: {', '.join(options)}"
    if takes_null(key):
        return f"{rule}; type {key}=null"
    return f"{rule}; leave it out for its default, or type {key}=VALUE"


def takes_null(key: str) -> bool:
    """Whether the schema has the key, and null is one of its values."""
    from rcpo.config.schema import Config

    kind: Any = Config
    for part in key.split("."):
        fields = getattr(kind, "__pydantic_fields__", {})
        if part not in fields:
            return False
        kind = fields[part].annotation
    return type(None) in get_args(kind)


def _refuse_file(word: str) -> None:
    """Raise UserError for a file in place of a word: of settings, or of pairs."""
    if word.endswith((".yaml", ".yml")):
        raise UserError(f"{shortened(word)}: {config_file_line(word)}")
    if word.endswith(DATA_SUFFIXES):
        raise UserError(f"{shortened(word)}: is no KEY=VALUE; type data=file data.path={word} for your pairs")


def config_file_line(given: str) -> str:
    """What to type for a file of settings, or the name of one; where it lies well already, as it is."""
    path = Path(given)
    folder = str(path.absolute().parent.parent) if path.parent.name == "experiment" else "DIR"
    if path.is_file() and re.search(rb"^axes:", path.read_bytes(), flags=re.MULTILINE):
        return f"is a sweep, not an experiment; type rcpo sweep {given}"
    typed = f"type --config-dir {folder} experiment={path.stem}"
    if folder != "DIR":
        return f"is no KEY=VALUE; {typed}"
    return (
        f"settings in a file are an experiment; write them as DIR/experiment/{path.stem}.yaml with the line "
        f"'# @package _global_' first, and {typed}"
    )
