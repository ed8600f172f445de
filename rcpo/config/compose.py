"""From command-line words to a plain config tree: Hydra composes, once, in the process that the user started.

Owns the search path of `conf/`; what Hydra's and OmegaConf's exceptions mean is in `rcpo.config.faults`.
Imports no torch, so that what only prints (--cfg, completion) is quick. Workers never compose: they read the
frozen RUN/config.yaml.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from rcpo.common.conf import conf_dir
from rcpo.common.errors import UserError
from rcpo.config.faults import explained
from rcpo.config.refused import refuse_words
from rcpo.config.words import MULTIRUN, grid_line, hydra_words, placed_module


def compose(argv: list[str]) -> dict[str, Any] | None:
    """Compose the config from `rcpo train`'s words; None when Hydra only printed something (--cfg, ...).

    Raises UserError (one line) for an unknown group, option or key, a malformed override, or an unset value.
    """
    if any(word in MULTIRUN for word in argv):
        raise UserError(grid_line(argv))
    refuse_words(argv)
    composed: list[DictConfig] = []
    _run_hydra(argv, composed.append)
    try:
        tree = None if not composed else _plain(composed[0])
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(explained(error, argv, config_dirs(argv), look_at)) from None
    if tree is not None:
        placed_module(tree.get("objective"), [Path.cwd(), *config_dirs(argv)])
    return tree


def _run_hydra(argv: list[str], use: Callable[[DictConfig], None]) -> None:
    """Let Hydra compose the config and hand it to `use`, or print what its flags ask for."""
    stderr = io.StringIO()  # argparse prints a usage there that rcpo does not want
    words = hydra_words(argv, [*config_dirs(argv), conf_dir()])
    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(use)
    saved_argv, saved_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["rcpo train", *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that the one line below is all that the user sees
    try:
        with contextlib.redirect_stderr(stderr):
            if any(word.startswith("-") for word in words):
                entry()
            else:
                _compose_once(words, use)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(explained(error, argv, config_dirs(argv), look_at)) from None
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


def _compose_once(words: list[str], use: Callable[[DictConfig], None]) -> None:
    """What `hydra.main` does where there are no flags. It composes twice, to ask for the mode first; a grid
    of 72 cells would take 11 s more."""
    with hydra.initialize_config_dir(str(conf_dir()), job_name="rcpo", version_base="1.3"):
        cfg = hydra.compose("config", words, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        use(cfg)


class Composition(NamedTuple):
    """What Hydra made of some words; values may be unset."""

    tree: dict[str, Any]
    choices: dict[str, str]
    """The selected option of each group."""
    options: dict[str, list[str]]
    """All options of each group."""


def look_at(argv: list[str]) -> Composition:
    """Compose without asking for every value; raises UserError as `compose` does."""
    refuse_words(argv)
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
