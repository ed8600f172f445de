"""From command-line words to a plain config tree: Hydra composes, once, in the process that the user started.

Owns the search path of `conf/` and the translation of Hydra's and OmegaConf's exceptions into one line.
Imports no torch, so that what only prints (--cfg, completion) is quick. Workers never compose: they read the
frozen RUN/config.yaml.
"""

import argparse
import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rcpo.common.conf import conf_dir
from rcpo.common.errors import UserError, shortened
from rcpo.config.words import MULTIRUN, grid_line, hydra_words, placed_module

PRINTING = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
"""Hydra's flags that print something and train nothing."""
FLAGS = (*PRINTING, "--package", "-p", "--resolve", "--config-dir", "-cd")
"""All flags. Hydra has others, which would move the run folder or compose something else."""


def only_prints(argv: list[str]) -> bool:
    """Whether these words ask for text instead of a run."""
    return any(word.split("=")[0] in PRINTING for word in argv)


def compose(argv: list[str]) -> dict[str, Any] | None:
    """Compose the config from `rcpo train`'s words; None when Hydra only printed something (--cfg, ...).

    Raises UserError (one line) for an unknown group, option or key, a malformed override, or an unset value.
    """
    if any(word in MULTIRUN for word in argv):
        raise UserError(grid_line(argv))
    _refuse_words(argv)
    composed: list[DictConfig] = []
    _run_hydra(argv, composed.append)
    try:
        tree = None if not composed else _plain(composed[0])
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(_explain(error, argv)) from None
    if tree is not None:
        placed_module(tree.get("objective"), [Path.cwd(), *config_dirs(argv)])
    return tree


def _refuse_words(argv: list[str]) -> None:
    """Raise UserError for what Hydra would take and rcpo does not."""
    for word in argv:
        name = word.lstrip("+").split("=")[0]
        if word.startswith("-") and word.split("=")[0] not in FLAGS:
            raise UserError(f"{shortened(word)}: no such flag; `rcpo train --help` lists them")
        if word.startswith("~"):
            raise UserError(
                f"{shortened(word)}: a key cannot be removed; type {name.lstrip('~')}=null if it can be null"
            )
        if re.match(r"hydra[./@]|hydra$", name):
            raise UserError(f"{shortened(word)}: rcpo makes its run folder and logs itself; leave it out")


def _run_hydra(argv: list[str], use: Callable[[DictConfig], None]) -> None:
    """Let Hydra compose the config and hand it to `use`, or print what its flags ask for."""
    stderr = io.StringIO()  # argparse prints a usage there that rcpo does not want
    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(use)
    saved_argv, saved_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["rcpo train", *hydra_words(argv, [*config_dirs(argv), conf_dir()])]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that the one line below is all that the user sees
    try:
        with contextlib.redirect_stderr(stderr):
            entry()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(_explain(error, argv)) from None
    except SystemExit as stop:
        if stop.code in (None, 0):
            return
        said = stderr.getvalue().strip().rsplit("error: ", 1)[-1].splitlines() or ["not a flag of rcpo train"]
        raise UserError(f"{said[0]}; `rcpo train --help` lists the flags") from None
    finally:
        sys.argv = saved_argv
        if saved_full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_full


class Composition(NamedTuple):
    """What Hydra made of some words; values may be unset."""

    tree: dict[str, Any]
    choices: dict[str, str]
    """The selected option of each group."""
    options: dict[str, list[str]]
    """All options of each group."""


def look_at(argv: list[str]) -> Composition:
    """Compose without asking for every value; raises UserError as `compose` does."""
    _refuse_words(argv)
    seen: list[Composition] = []

    def collect(cfg: DictConfig) -> None:
        loader = GlobalHydra.instance().config_loader()
        options = {group: loader.get_group_options(group) for group in loader.list_groups("")}
        tree = OmegaConf.to_container(cfg, resolve=False)
        assert isinstance(tree, dict)
        named = {str(key): value for key, value in tree.items()}
        seen.append(Composition(named, dict(HydraConfig.get().runtime.choices), options))

    _run_hydra(argv, collect)
    return seen[0]


def offered(flags: list[str], words: list[str], begun: str) -> list[str]:
    """What Hydra completes the word `begun` to, behind `words`; `flags` may hold --config-dir. Where all that
    can follow is one section, its keys. Raises UserError where the words are wrong. For a process that does
    nothing else: Hydra is asked as a shell asks, by $COMP_LINE."""
    line = " ".join(["rcpo-train", *words, begun])
    os.environ |= {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        _run_hydra([*flags, "--shell-completion", "query=bash"], lambda cfg: None)
    found = said.getvalue().split()
    is_section = len(found) == 1 and found[0].endswith(".") and found[0] != begun
    return offered(flags, words, found[0]) if is_section else found


def config_dirs(argv: list[str]) -> list[Path]:
    """The folder that --config-dir names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    known, _ = parser.parse_known_args(argv)
    return [] if known.config_dir is None else [known.config_dir]


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """A plain dict with interpolations resolved and every value set."""
    tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(tree, dict)
    if tree.pop("cluster", None):
        raise UserError("cluster: is a SLURM profile, for sweeps; type rcpo sweep FILE --slurm PROFILE")
    if lost := tree.pop("experiment", None):
        raise UserError(
            f"experiment: its file sets experiment.{next(iter(lost))}, which is no key of rcpo; "
            "begin the file with the line '# @package _global_'"
        )
    return {str(key): value for key, value in tree.items()}


def _explain(error: Exception, argv: list[str]) -> str:
    """One line: what was seen, the rule, what to type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, yaml.YAMLError | UnicodeDecodeError):
        return _explain_file(error, argv)
    key = getattr(error, "full_key", None)
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: has no value and needs one; type {key}=..."
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read as KEY=VALUE; quote values that hold signs as KEY='\"VALUE\"'"
        )
    if match := re.match(r"In '[^']*': Could not find '([^']+)/([^/']*)'", lines[0]):
        options = re.findall(r"^\t(\S+)$", str(error), flags=re.MULTILINE)
        close = difflib.get_close_matches(match[2], options, n=1, cutoff=0.7)
        hint = f"did you mean {match[1]}={close[0]}? The options are" if close else "choose one of"
        return f"{match[1]}={match[2]}: no such option; {hint} {', '.join(options)}"
    if match := re.match(r"In '(experiment/[^']+)': Could not override '[^']*@experiment\.", lines[0]):
        return f"{match[1]}.yaml: must begin with the line '# @package _global_'; write that first"
    if match := re.match(r"Additional config directory '([^']+)' not found", lines[0]):
        return f"--config-dir {match[1]}: no such folder; give one that is there"
    if match := re.match(r"Could not override '([^']+)'", lines[0]):
        return _explain_unknown_key(match[1], argv)
    if lines[0].startswith(("Ambiguous value for argument", "Sweep parameters")):
        return grid_line(argv)
    if match := re.match(r"Multiple values for ([^.\s]+)", lines[0]):
        return f"+{match[1]}: has an option already; type {match[1]}=OPTION without the +"
    if match := re.match(r"Error merging override (.+)", lines[0]):
        return f"{match[1].lstrip('+')}: is of another kind than its key; `rcpo train --help` shows values"
    if match := re.match(r"In '([^']+)': \w+ raised while composing config", lines[0]):
        return f"{match[1]}.yaml: does not hold keys and values of its group; write it as KEY: VALUE lines"
    if lines[0].startswith("Config group override must be"):  # as in objective=null
        return "null: is no option of a group; `rcpo train --help` lists groups and options"
    if lines[0].startswith("Could not override ''"):
        return "=: cannot be read as KEY=VALUE"
    if match := re.match(r"\w+ raised while resolving interpolation: (.+)", lines[0]):
        return f"{key}: {match[1]}; type {key}=VALUE"
    if key:
        return f"{key}: {lines[0][0].lower()}{lines[0][1:]}; type {key}=VALUE"
    return " ".join(" ".join(lines).split())


def _explain_file(error: Exception, argv: list[str]) -> str:
    """A YAML file of the user's that cannot be read, by its name."""
    for folder in config_dirs(argv):
        for path in sorted(folder.rglob("*.yaml")):
            try:
                yaml.safe_load(path.read_bytes())
            except yaml.MarkedYAMLError as fault:
                line = "" if fault.problem_mark is None else f"line {fault.problem_mark.line + 1}: "
                return f"{path}: is not YAML ({line}{fault.problem}); mend it"
            except (yaml.YAMLError, UnicodeDecodeError):
                return f"{path}: is not UTF-8 text; save it as UTF-8"
    return " ".join(str(error).split())


def _explain_unknown_key(key: str, argv: list[str]) -> str:
    """Name the option that lacks the key, and the key that is spelt most like it."""
    advice = "`rcpo train --help` lists them"
    group = key.split(".")[0]
    try:
        seen = look_at(_without_printing([word for word in argv if word.lstrip("+~").split("=")[0] != key]))
    except UserError:  # another word is wrong too; one message at a time
        return f"{key}: no such key; {advice}"
    option = f"{group}={seen.choices[group]} has" if group in seen.choices and "." in key else ""
    fault = f"{option} no such key".strip()
    close = difflib.get_close_matches(key, _key_names(seen.tree), n=1, cutoff=0.8)
    return f"{key}: {fault}; {f'did you mean {close[0]}? ' if close else ''}{advice}"


def _without_printing(argv: list[str]) -> list[str]:
    """The words that choose and set, without flags that print."""
    folders = [word for folder in config_dirs(argv) for word in ("--config-dir", str(folder))]
    return [*folders, *(word for word in argv if "=" in word and not word.startswith("-"))]


def _key_names(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all keys of a tree."""
    names = []
    for key, value in tree.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, dict):
            names += _key_names(value, f"{prefix}{key}.")
    return names
