"""From command-line words to a plain config tree: Hydra composes, once, in the process that the user started.

Owns the search path of `conf/` and the translation of Hydra's and OmegaConf's exceptions into one line.
Workers never compose: they read the frozen RUN/config.yaml.
"""

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import rcpo
from rcpo.errors import UserError


def conf_dir() -> Path:
    """The folder of shipped YAML files: inside the package (a wheel), else beside it (a source tree)."""
    package = Path(rcpo.__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"no conf/ folder beside or inside {package}; install rcpo again")


def compose(argv: list[str]) -> dict[str, Any] | None:
    """Compose the config from `rcpo train`'s words; None when Hydra only printed something (--help, --cfg,
    ...).

    Raises UserError (one line) for an unknown group, option or key, a malformed override, or an unset value.
    """
    if flag := next((word for word in argv if word in ("-m", "--multirun")), None):
        raise UserError(f"{flag}: `rcpo train` makes one run; type one command for each")
    composed: list[DictConfig] = []
    stderr = io.StringIO()  # argparse prints a usage there that rcpo does not want
    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(composed.append)
    saved_argv, saved_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["rcpo train", *(_calibration_word(word) for word in argv)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that the one line below is all that the user sees
    try:
        with contextlib.redirect_stderr(stderr):
            entry()
        return None if not composed else _plain(composed[0])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(_explain(error)) from None
    except SystemExit as stop:
        if stop.code in (None, 0):
            return None
        said = stderr.getvalue().strip().rsplit("error: ", 1)[-1].splitlines() or ["not a flag of rcpo train"]
        raise UserError(f"{said[0]}; `rcpo train --help` lists the flags") from None
    finally:
        sys.argv = saved_argv
        if saved_full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_full


def _calibration_word(word: str) -> str:
    """calibration=true/false mean on/off, which is what YAML 1.1 makes of them elsewhere."""
    match = re.fullmatch(r"calibration=(true|false)", word, flags=re.IGNORECASE)
    return word if match is None else f"calibration={'on' if match[1].lower() == 'true' else 'off'}"


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """A plain dict with interpolations resolved and every value set."""
    tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(tree, dict)
    for group in ("cluster", "experiment"):
        tree.pop(group, None)
    return {str(key): value for key, value in tree.items()}


def _explain(error: Exception) -> str:
    """One line: what was seen, the rule, what to type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    key = getattr(error, "full_key", None)
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: has no value and needs one; type {key}=..."
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read as KEY=VALUE; quote values that hold signs as KEY='\"VALUE\"'"
        )
    if match := re.match(r"In '[^']*': Could not find '([^']+)/([^/']+)'", lines[0]):
        options = re.findall(r"^\t(\S+)$", str(error), flags=re.MULTILINE)
        return f"{match[1]}={match[2]}: no such option; choose one of {', '.join(options)}"
    if match := re.match(r"Could not override '([^']+)'", lines[0]):
        return f"{match[1]}: no such key; `rcpo train --help` lists them"
    if match := re.match(r"Multiple values for ([^.\s]+)", lines[0]):
        return f"+{match[1]}: has an option already; type {match[1]}=OPTION without the +"
    if lines[0].startswith("Config group override must be"):  # as in objective=null
        return "null: is no option of a group; `rcpo train --help` lists groups and options"
    if key:
        return f"{key}: {lines[0][0].lower()}{lines[0][1:]}; type {key}=VALUE"
    return " ".join(" ".join(lines).split())
