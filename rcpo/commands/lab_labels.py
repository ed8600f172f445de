"""Who labels refusals in `rcpo lab refusal`: phrases, a classifier, or a judge of the chat API, whose costs
are said first."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcpo.commands.settings import Setting, number_in, whole_number
from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.evaluation.answer_files import Conversation
    from rcpo.evaluation.refusals import Labeller

REPLY_TOKENS = 16
SETTINGS = (
    Setting("phrases", "a text file of phrases by which a refusal is known, one a line", Path),
    Setting("classifier", "in their place a sequence classifier of one number: a folder or a hub id"),
    Setting("threshold", "above it an answer counts as refused (default: 0)", number_in(-1e9, 1e9), 0.0),
    Setting("url", "in their place a judge of the chat API, as of rcpo judge: http://localhost:8000/v1"),
    Setting("judge", "the judge's name there"),
    Setting("timeout", "seconds that its reply may take (default: 60)", whole_number(1), 60),
    Setting("at_once", "requests that are open together (default: 4)", whole_number(1), 4),
)


def check(settings: argparse.Namespace) -> None:
    """Raise UserError for words that do not go together."""
    given = [key for key in ("phrases", "classifier", "url") if getattr(settings, key) is not None]
    if len(given) > 1:
        first, second = given[:2]
        raise UserError(f"{first}={getattr(settings, first)}: {second}= labels in their place; leave one out")
    if settings.url is not None or settings.judge is not None:
        from rcpo.commands.judge_settings import check_address

        check_address(settings, "classifier=MODEL")
    elif settings.yes:
        raise UserError("--yes: is for a judge, which url= gives; leave it out")


def phrases_of(path: Path) -> list[str]:
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(f"phrases={path}: {said}; give a text file with a phrase a line") from None
    if not found:
        raise UserError(f"phrases={path}: is empty; give a text file with a phrase a line")
    return found


def load(settings: argparse.Namespace) -> "Labeller":
    """Raises UserError where it cannot be used."""
    from rcpo.evaluation.refusals import Classifier, Rules

    if settings.url is not None:
        from rcpo.evaluation.chat import ChatSettings, refuse_missing_client
        from rcpo.evaluation.refusals_by_chat import ChatLabeller

        refuse_missing_client(settings.url)
        return ChatLabeller(
            ChatSettings(
                settings.url.rstrip("/"), settings.judge, settings.timeout, settings.at_once, REPLY_TOKENS
            )
        )
    if settings.classifier is not None:
        return Classifier(settings.classifier, settings.threshold)
    return Rules() if settings.phrases is None else Rules(phrases_of(settings.phrases))


def agree(settings: argparse.Namespace, prompts: "Sequence[Conversation]", num_runs: int) -> None:
    """Say what a judge may be sent. Raises UserError where that is not agreed to: nothing was done."""
    if settings.url is None:
        return
    from rcpo.evaluation.refusals_by_chat import bound

    most = bound(prompts, 2 + 1 + num_runs, settings.max_new_tokens)
    said = (
        f"at most {most.requests} requests to {settings.url}: about {most.tokens} tokens, and at most "
        f"{most.requests * REPLY_TOKENS} of replies"
    )
    if not settings.yes:
        raise UserError(f"{said}; nothing was sent: type --yes to send them")
    print(said)
