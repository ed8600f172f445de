"""Flags of commands: argparse whose errors are one line, and checks of their values. Called by
`rcpo.commands`."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from rcpo.common.errors import UserError


class Flags(argparse.ArgumentParser):
    """Words and --flags of `rcpo COMMAND`; help is the command's own text."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"rcpo {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists words and flags")


def positive_int(text: str) -> int:
    """A whole number above 0."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value


def check_writable(flag: str, path: Path, *, is_folder: bool = False) -> None:
    """Raise UserError where no file, or no files of a folder, can be written at `path`, before the work."""
    if path.exists() and path.is_dir() != is_folder:
        kind, wanted = ("file", "folder") if is_folder else ("folder", "file")
        raise UserError(f"{flag} {path}: is a {kind}; give the name of a {wanted}")
    places = [path, *path.absolute().parents] if is_folder else path.absolute().parents
    above = next(place for place in places if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{flag} {path}: {above} is no folder that can be written to; give another name")
