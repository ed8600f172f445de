"""A server of the OpenAI chat API, at any URL: questions and its replies.

Owns what it costs, the faults of a server, and what is kept of its replies (RCPO_CACHE/judge, by content).
The client is the `openai` package (the extra [judge]), with its retries. Its key comes from OPENAI_API_KEY
alone. Does not know what is asked (`judge.py`, `refusals_by_chat.py`)."""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from rcpo.common.errors import UserError, first_line, shortened
from rcpo.evaluation.kept import keep, kept

KEY = "OPENAI_API_KEY"
KIND = "judge"
"""Of what is kept."""
RETRIES = 4
"""Of the client, with growing waits, where a server is busy or a connection breaks."""
CHARACTERS_PER_TOKEN = 4
"""About, for what is said of costs."""


@dataclass(frozen=True)
class ChatSettings:
    url: str
    model: str
    timeout_seconds: int
    at_once: int
    """Requests that are open together."""
    reply_tokens: int


@dataclass(frozen=True)
class Cost:
    """Of what has not been asked yet."""

    requests: int
    kept: int
    """Replies that are there already."""
    tokens: int
    """Of the requests, about."""


def refuse_missing_client(url: str) -> None:
    """Raise UserError where the openai package is not here."""
    if importlib.util.find_spec("openai") is None:
        raise UserError(
            f"url={url}: needs the openai package; type pip install 'rcpo[judge]', or model=MODEL for a "
            "local reward model"
        )


class Chat:
    """Asks; what is kept is not asked again."""

    def __init__(self, settings: ChatSettings, asked: Sequence[list[dict[str, str]]]) -> None:
        """`asked`: messages, each to be replied to. Raises UserError where the client is not here."""
        refuse_missing_client(settings.url)
        self._settings, self._asked = settings, list(asked)
        self._replies = [self._kept(messages) for messages in self._asked]

    def cost(self) -> Cost:
        waiting = self._waiting()
        letters = sum(len(turn["content"]) for idx in waiting for turn in self._asked[idx])
        return Cost(len(waiting), len(self._asked) - len(waiting), letters // CHARACTERS_PER_TOKEN)

    def ask(self, advance: Callable[[int], None]) -> list[str]:
        """All replies. Raises UserError where the server cannot be used; replies until then are kept."""
        import openai

        settings = self._settings
        client = openai.OpenAI(
            base_url=settings.url,
            api_key=os.environ.get(KEY) or "none",  # local servers want none, the client does
            timeout=settings.timeout_seconds,
            max_retries=RETRIES,
        )
        with client, ThreadPoolExecutor(settings.at_once) as pool:
            futures = {pool.submit(self._reply, client, idx): idx for idx in self._waiting()}
            try:
                for future in as_completed(futures):
                    self._replies[futures[future]] = future.result()
                    advance(1)
            except openai.OpenAIError as error:
                raise UserError(self._fault(error)) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return [str(reply) for reply in self._replies]

    def refuse_unreadable(self, replies: Sequence[str], read: Sequence[object]) -> None:
        """Raise UserError where no reply could be read."""
        if not any(each is not None for each in read):
            raise UserError(
                f"judge={self._settings.model}: none of its {len(replies)} replies can be read, the first is "
                f"{shortened(repr(replies[0]))}; give another judge"
            )

    def _waiting(self) -> list[int]:
        return [idx for idx, reply in enumerate(self._replies) if reply is None]

    def _reply(self, client: Any, idx: int) -> str:
        """Asked of the server, and kept at once. A request that the server refuses alone, too long say, is a
        reply that cannot be read."""
        import openai

        try:
            answer = client.chat.completions.create(
                model=self._settings.model,
                messages=self._asked[idx],
                temperature=0,
                max_tokens=self._settings.reply_tokens,
            )
            text = answer.choices[0].message.content or ""
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return f"refused: {first_line(error)}"
        except (AttributeError, IndexError, TypeError):
            return "refused: the reply is no chat completion"
        self._keep(self._asked[idx], text)
        return text

    def _fault(self, error: Exception) -> str:
        """One line for what the client raised."""
        import openai

        settings, where = self._settings, f"url={self._settings.url}"
        safe = "replies so far are kept"
        if isinstance(error, openai.APITimeoutError):
            longer = 5 * settings.timeout_seconds
            return f"{where}: no reply in {settings.timeout_seconds} s; {safe}: type timeout={longer}"
        if isinstance(error, openai.APIConnectionError):
            return f"{where}: cannot be reached; {safe}: start the server, or give another url"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"{where}: refuses the key ({first_line(error)}); use another one in {KEY}"
        if isinstance(error, openai.NotFoundError):
            return f"{where}: knows no judge={settings.model} ({first_line(error)}); give another name or url"
        return f"{where}: failed ({first_line(error)}); {safe}: type the same again"

    def _key(self, messages: list[dict[str, str]]) -> str:
        settings = self._settings
        return json.dumps([settings.url, settings.model, settings.reply_tokens, messages])

    def _kept(self, messages: list[dict[str, str]]) -> str | None:
        reply = (kept(KIND, self._key(messages)) or {}).get("reply")
        return reply if isinstance(reply, str) else None

    def _keep(self, messages: list[dict[str, str]], reply: str) -> None:
        keep(KIND, self._key(messages), {"reply": reply})
