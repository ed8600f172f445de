"""Words of `rcpo judge`: its settings, and which of them do not go together. `rcpo lab refusal` has a judge's
address too."""

import argparse
import re
from pathlib import Path
from urllib.parse import urlsplit

from rcpo.commands.flags import check_writable
from rcpo.commands.settings import Setting, one_of, whole_number
from rcpo.common.errors import UserError


def prices(text: str) -> tuple[float, float]:
    """Of a million tokens that are read, and that are written."""
    try:
        read, written = map(float, text.split(","))
    except ValueError:
        raise ValueError("must be two numbers, as in price=2.5,10") from None
    if not (0 <= read <= 1e6 and 0 <= written <= 1e6):
        raise ValueError("must be two numbers from 0 to a million")
    return read, written


def column_name(text: str) -> str:
    """Of a column and of files."""
    if not re.fullmatch(r"[A-Za-z][\w.-]{0,40}", text):
        raise ValueError("must be up to 41 letters, digits, '_', '.' or '-', and start with a letter")
    return text


AGAINST = ("off", "initial")
SETTINGS = (
    Setting("url", "the chat API of a judge, as OpenAI's: http://localhost:8000/v1"),
    Setting("judge", "the judge's name there"),
    Setting("model", "in place of both a local reward model: a folder or a hub id"),
    Setting("out", "a .json file for the verdicts, prompt by prompt", Path),
    Setting("price", "READ,WRITTEN of a million tokens, for what is said of costs", prices),
    Setting("timeout", "seconds that a reply may take (default: 60)", whole_number(1), 60),
    Setting("at_once", "requests that are open together (default: 4)", whole_number(1), 4),
    Setting("reply_tokens", "tokens of a reply, at most (default: 64)", whole_number(1), 64),
    Setting(
        "against",
        "of runs: off, of the same seed, or initial, the model it started from",
        one_of(AGAINST),
        None,
        AGAINST,
    ),
    Setting("prompts", "of runs: a file; held_out (default), the run's pairs; arithmetic"),
    Setting("limit", "of runs: only so many of the first prompts", whole_number(1)),
    Setting("max_new_tokens", "of runs: of an answer (default: 512)", whole_number(1)),
    Setting("batch", "of runs: prompts at once (default: 16)", whole_number(1)),
    Setting("column", "of runs: its name in rcpo compare (default: win_vs_off, win_vs_initial)", column_name),
)
OF_RUNS = {"prompts": "held_out", "limit": None, "max_new_tokens": 512, "batch": 16, "column": None}
"""Settings that two files have no need of, and what they are where nothing is typed."""


def check(settings: argparse.Namespace) -> None:
    """Raise UserError for words that do not go together."""
    if settings.model is not None:
        if settings.url is not None or settings.judge is not None:
            raise UserError(f"model={settings.model}: is a judge by itself; leave out url and judge")
    else:
        check_address(settings)
    if settings.out is not None:
        if settings.out.suffix != ".json":
            raise UserError(f"out={settings.out}: must end in .json; type out={settings.out.stem}.json")
        check_writable("out", settings.out)


def check_address(settings: argparse.Namespace, instead: str = "model=MODEL") -> None:
    """Raise UserError where url= and judge= name no judge."""
    if settings.url is None or settings.judge is None:
        missing = "url" if settings.url is None else "judge"
        raise UserError(f"{missing}: is missing; type url=URL and judge=NAME, or {instead}")
    parts = urlsplit(settings.url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"url={settings.url}: is no address; type url=http://HOST:PORT/v1")
    if parts.username or parts.password:
        raise UserError("url: must not hold a key or password; set OPENAI_API_KEY in the environment")
