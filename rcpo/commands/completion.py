"""`rcpo completion bash|zsh|fish`: the shell code that completes rcpo's words on TAB, and what it offers.

argcomplete gives the code, which runs `rcpo` itself at every TAB, and reads commands and flags from the one
parser. What a word may be says its metavar there; the words of a config come from Hydra.
"""

import argparse
import contextlib
import os
from collections.abc import Iterable
from typing import Any, NoReturn

from argcomplete import CompletionFinder, shellcode, split_line
from argcomplete.completers import BaseCompleter, DirectoriesCompleter, FilesCompleter

from rcpo.commands.flags import Flags
from rcpo.commands.parser import command_parser, whole_parser
from rcpo.common.errors import UserError

SHELLS = ("bash", "zsh", "fish")
NOT_TRAINED_WITH = ("hydra", "cluster")
"""Groups that Hydra knows and `rcpo train` refuses."""


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Print the code that completes rcpo's words on TAB. To have it in every new shell:

  bash, in ~/.bashrc:                    eval "$(rcpo completion bash)"
  zsh, in ~/.zshrc, behind compinit:     eval "$(rcpo completion zsh)"
  fish, in ~/.config/fish/config.fish:   rcpo completion fish | source

Then TAB completes commands (rcpo tr), groups and options (rcpo train objective=s), keys (rcpo train
train.st), your own options behind --config-dir DIR, flags, and files (rcpo train data.path=pa)."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads it")


def run(options: argparse.Namespace) -> int:
    """Print the code; returns the exit code."""
    print(shellcode(["rcpo"], shell=options.shell))
    return 0


def answer_shell() -> NoReturn:
    """Say what can come at the cursor of $COMP_LINE, as the shell's code asks, and exit."""
    words = _words_before()
    Finder()(
        whole_parser(words[0] if words else None), always_complete_options=False, default_completer=Values()
    )
    raise SystemExit(1)  # argcomplete exits when it has answered


class Finder(CompletionFinder):
    """argcomplete's, for commands that take words and flags in any order."""

    def collect_completions(
        self, active_parsers: list[Any], parsed_args: argparse.Namespace, cword_prefix: str
    ) -> list[str]:
        parser = active_parsers[-1]
        if not parser.active_actions:  # argparse by itself takes no words behind a flag that is behind words
            parser.active_actions = parser._get_positional_actions()[-1:]
        completions: list[str] = super().collect_completions(active_parsers, parsed_args, cword_prefix)
        return completions


class Values(BaseCompleter):
    """What the value of a word or a flag can be."""

    def __call__(self, *, prefix: str, action: argparse.Action, **kwargs: Any) -> Iterable[str]:
        metavar = str(action.metavar)
        if settings := getattr(action, "settings", ()):
            return _setting_words(prefix, {setting.name: setting.offered for setting in settings})
        match metavar:
            case "KEY=VALUE":
                return _config_words(prefix)
            case "PROFILE":
                profiles = _from_hydra(f"cluster={prefix}")
                return [*(word.removeprefix("cluster=") for word in profiles), *FilesCompleter()(prefix)]
            case "RUN" | "SWEEP" | "RUN|SWEEP" | "DIR":
                return DirectoriesCompleter()(prefix=prefix, action=action, **kwargs)
            case "FILE" | "PATH":
                return FilesCompleter()(prefix)
        return metavar.split("|") if metavar.islower() else []


def _setting_words(begun: str, settings: dict[str, tuple[str, ...]]) -> list[str]:
    """Names of settings and folders, or the values of the setting that is begun."""
    name, equals, value = begun.partition("=")
    if not equals:
        return [*(f"{each}=" for each in settings if each.startswith(begun)), *FilesCompleter()(begun)]
    offered = settings.get(name) or tuple(FilesCompleter()(value))
    return [f"{name}={each}" for each in offered if each.startswith(value)]


def _words_before() -> list[str]:
    """The whole words of $COMP_LINE between `rcpo` and the cursor."""
    words: list[str] = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    return words[1:]


def _config_words(begun: str) -> list[str]:
    """Groups, options and keys, or files for the value of a key."""
    name, *before = _words_before()
    try:
        options, _ = command_parser(name).parse_known_intermixed_args([*before, begun])
    except (UserError, SystemExit):
        return []
    words = [word for word in getattr(options, "words", []) if "=" in word and word != begun]
    if getattr(options, "multirun", False):
        return _of_several(begun, options.hydra, words)
    found = _from_hydra(begun, getattr(options, "hydra", []), words)
    found = [word for word in found if not word.startswith(NOT_TRAINED_WITH)]
    if name == "data" and "=" not in begun:
        found += FilesCompleter()(begun)
    key, equals, value = begun.partition("=")
    return found or [f"{key}={path}" for path in FilesCompleter()(value) if equals]


def _of_several(begun: str, flags: Iterable[str], words: Iterable[str]) -> list[str]:
    """The same behind -m: a word may have several values, and the last one is completed."""
    from rcpo.config.words import values_of

    ones = []
    for word in words:
        with contextlib.suppress(UserError):
            values = values_of(word)
            ones.append(word if not values else f"{word.partition('=')[0]}={values[0]}")
    key, equals, value = begun.partition("=")
    before, comma, last = value.rpartition(",")
    found = _from_hydra(f"{key}{equals}{last}", flags, ones)
    found = [word for word in found if not word.startswith(NOT_TRAINED_WITH)]
    return [f"{key}={before},{word.partition('=')[2]}" for word in found] if comma else found


def _from_hydra(begun: str, flags: Iterable[str] = (), words: Iterable[str] = ()) -> list[str]:
    """None where Hydra refuses what is there already."""
    from rcpo.config.compose import offered

    try:
        return offered(list(flags), list(words), begun)
    except UserError:
        return []
