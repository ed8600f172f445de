"""What Hydra, OmegaConf and YAML say of wrong words and files, in one line: what was seen, the rule, what to
type. Called by `rcpo.config.compose`, which owns composing; imports no torch.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml
from hydra.errors import OverrideParseException
from omegaconf.errors import MissingMandatoryValue

from rcpo.common.conf import conf_dir, option_tree
from rcpo.common.errors import UserError, shortened
from rcpo.config.other_names import typed_here
from rcpo.config.refused import DATA_SUFFIXES
from rcpo.config.words import grid_line

if TYPE_CHECKING:
    from rcpo.config.compose import Composition

Look: TypeAlias = "Callable[[list[str]], Composition]"
"""`rcpo.config.compose.look_at`."""
HELP = "`rcpo train --help` lists them"
WHATEVER_IS_CHOSEN = ("train.", "launch.", "model.", "optim.lr")
"""Keys that are there whatever options are chosen."""
MOST_NAMED = 6
"""Options named in one line."""


def explained(error: Exception, argv: list[str], folders: Sequence[Path], look_at: Look) -> str:
    """The line for what composing the words `argv` raised; `folders` are the user's own of options."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, yaml.YAMLError | UnicodeDecodeError):
        return _explain_file(error, folders)
    key = getattr(error, "full_key", None)
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: has no value and needs one; type {key}=..."
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read as KEY=VALUE; quote values that hold signs as KEY='\"VALUE\"'"
        )
    if match := re.match(r"In '[^']*': Could not find '([^'/]+)/([^']*)'", lines[0]):
        options = re.findall(r"^\t(\S+)$", str(error), flags=re.MULTILINE)
        return _explain_option(match[1], match[2], options, folders)
    if match := re.match(r"In '(experiment/[^']+)': Could not override '[^']*@experiment\.", lines[0]):
        return f"{match[1]}.yaml: must begin with the line '# @package _global_'; write that first"
    if match := re.match(r"Additional config directory '([^']+)' not found", lines[0]):
        return f"--config-dir {match[1]}: no such folder; give one that is there"
    if match := re.match(r"Could not override '([^']+)'", lines[0]):
        return _explain_unknown_key(match[1], argv, folders, look_at)
    if lines[0].startswith(("Ambiguous value for argument", "Sweep parameters")):
        return grid_line(argv)
    if match := re.match(r"Multiple values for ([^.\s]+)", lines[0]):
        given = next((word for word in argv if word.startswith(f"+{match[1]}=")), f"+{match[1]}=OPTION")
        return f"{given}: is a group that is there already; type {given[1:]} without the +"
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


def _explain_file(error: Exception, folders: Sequence[Path]) -> str:
    """A YAML file of the user's that cannot be read, by its name."""
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            try:
                yaml.safe_load(path.read_bytes())
            except yaml.MarkedYAMLError as fault:
                line = "" if fault.problem_mark is None else f"line {fault.problem_mark.line + 1}: "
                return f"{path}: is not YAML ({line}{fault.problem}); mend it"
            except (yaml.YAMLError, UnicodeDecodeError):
                return f"{path}: is not UTF-8 text; save it as UTF-8"
    return " ".join(str(error).split())


def _explain_option(group: str, option: str, options: list[str], folders: Sequence[Path]) -> str:
    """GROUP=OPTION that there is no file of."""
    seen = f"{group}={shortened(option)}"
    if group == "experiment":
        return _explain_missing_file(option, options, folders)
    if group == "model" and "/" in option:
        return f"{seen}: is no option; a model's folder or hub id is a key: type model.path={option}"
    if group == "data" and ("/" in option or option.endswith(DATA_SUFFIXES)):
        return f"{seen}: is no option; your pairs are a key: type data=file data.path={option}"
    typed = (typed_here(name, option) for name in ("optimizer", "loss_type"))
    known = next((word for word in typed if word and word != seen and word in _words(group, options)), None)
    close = difflib.get_close_matches(option, options, n=1, cutoff=0.7)
    if known is not None or close:
        hint = f"did you mean {known or f'{group}={close[0]}'}? The options are"
    else:
        hint = "choose one of"
    return f"{seen}: no such option; {hint} {', '.join(options)}"


def _words(group: str, options: list[str]) -> list[str]:
    return [f"{group}={option}" for option in options]


def _explain_missing_file(name: str, options: list[str], folders: Sequence[Path]) -> str:
    """An experiment whose file is not where experiments are."""
    if close := difflib.get_close_matches(name, options, n=1, cutoff=0.7):
        there = f"did you mean experiment={close[0]}?"
    else:
        there = f"there {'is' if len(options) == 1 else 'are'} {', '.join(options)}"
    for folder in folders:
        if (stray := folder / f"{name}.yaml").is_file():
            return f"experiment={name}: {stray} lies one folder too high; move it to {folder}/experiment/"
    if folders:
        return f"experiment={name}: no file {folders[0]}/experiment/{name}.yaml; write it ({there})"
    return (
        f"experiment={name}: no such file; write DIR/experiment/{name}.yaml and type "
        f"--config-dir DIR experiment={name} ({there})"
    )


def _explain_unknown_key(key: str, argv: list[str], folders: Sequence[Path], look_at: Look) -> str:
    """Name the key that is meant: by another tool's name for it, by its spelling, or by the options that have
    it where the chosen one has not."""
    given = next((word for word in argv if word.lstrip("+~").split("=")[0] == key), key)
    typed = typed_here(key, shortened(given.partition("=")[2]) or "VALUE")
    meant = key if typed is None else typed.split("=")[0]
    if typed is not None and meant.startswith(WHATEVER_IS_CHOSEN):
        return f"{key}: no such key; type {typed}"
    try:
        seen = look_at(_without_printing([word for word in argv if word != given], folders))
    except UserError:  # another word is wrong too; one message at a time
        return f"{key}: no such key; {HELP}"
    names = _key_names(seen.tree)
    group, is_in_group, last = meant.partition(".")
    is_of_option = bool(is_in_group) and group in seen.choices
    if typed is not None and (meant in names or not is_of_option):
        return f"{key}: no such key; type {typed}"
    fault = f"{group}={seen.choices[group]} has no such key" if is_of_option else "no such key"
    if typed is None and (alike := _spelt_like(key, names)) is not None:
        return f"{key}: {fault}; did you mean {alike}? {HELP}"
    having = _options_with(group, last) if is_of_option else []
    if having:
        own = [name for name in names if name.startswith("objective.") and _is_parameter(name)]
        has = f", only {', '.join(own)}" if group == "objective" and own else ""
        has_it = " has" if len(having) == 1 else " have"
        return f"{key}: {fault}{has}; {group}={', '.join(having)}{has_it} {meant}"
    return f"{key}: {fault}; {HELP}"


def _without_printing(argv: list[str], folders: Sequence[Path]) -> list[str]:
    """The words that choose and set, without flags that print."""
    places = [word for folder in folders for word in ("--config-dir", str(folder))]
    return [*places, *(word for word in argv if "=" in word and not word.startswith("-"))]


def _spelt_like(key: str, names: list[str]) -> str | None:
    """The name whose last part, and then the whole, is most like the key's."""
    last = key.rpartition(".")[2]
    ends = {name: name.rpartition(".")[2] for name in names}
    same = [name for name, end in ends.items() if end == last]
    if len(same) == 1 and "." not in key:
        return same[0]
    alike = set(difflib.get_close_matches(last, set(ends.values()), n=9, cutoff=0.75))
    near = [name for name, end in ends.items() if end in alike]
    return next(iter(difflib.get_close_matches(key, near, n=1, cutoff=0.7)), None)


def _options_with(group: str, key: str) -> list[str]:
    """The options of a group whose file gives the key a value, the first few."""
    files = sorted((conf_dir() / group).glob("*.yaml"))
    found = [file.stem for file in files if key.split(".")[0] in option_tree(file)]
    return found if len(found) <= MOST_NAMED else [*found[:MOST_NAMED], "others"]


def _is_parameter(name: str) -> bool:
    """Whether a key of `objective` is a parameter of the loss, and not what all objectives have."""
    return name.partition(".")[2] not in ("name", *option_tree(conf_dir() / "every_objective.yaml"))


def _key_names(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all keys of a tree."""
    names = []
    for key, value in tree.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, dict):
            names += _key_names(value, f"{prefix}{key}.")
    return names
