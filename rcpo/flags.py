"""Flags of commands: argparse whose errors are one line. Called by `rcpo.commands`."""

import argparse
from typing import NoReturn

from rcpo.errors import UserError


class Flags(argparse.ArgumentParser):
    """Words and --flags of `rcpo COMMAND`; help is the command's own text."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"rcpo {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists words and flags")


def positive_int(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value
