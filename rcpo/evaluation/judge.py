"""A judge that speaks the OpenAI chat API, at any URL: which of two answers is better, in both orders.

Owns what it is asked, how its replies are read, and what is kept of them (RCPO_CACHE/judge, by content). The
client is the `openai` package (the extra [judge]), with its retries. Its key comes from OPENAI_API_KEY
alone."""

import importlib.util
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from rcpo.common.errors import UserError, first_line, shortened
from rcpo.evaluation.answer_files import Duel
from rcpo.evaluation.kept import keep, kept

KEY = "OPENAI_API_KEY"
KIND = "judge"
"""Of what is kept."""
RETRIES = 4
"""Of the client, with growing waits, where a server is busy or a connection breaks."""
CHARACTERS_PER_TOKEN = 4
"""About, for what is said of costs."""
SYSTEM = """\
You compare two answers to the same request. Judge which of them serves the person better: correct, on the
point, honest, clear. Neither length nor the order in which you see them counts. Reply with one of
[[1]] (the first is better), [[2]] (the second is better), [[tie]], and nothing else."""
_VERDICT = re.compile(r"\[\[\s*(1|2|tie)\s*\]\]", re.IGNORECASE)
_BARE = re.compile(r"\W*(1|2|tie)\W*", re.IGNORECASE)
FIRST, SECOND, TIE = "1", "2", "tie"


@dataclass(frozen=True)
class JudgeSettings:
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


def verdict_of(reply: str) -> str | None:
    """`FIRST`, `SECOND` or `TIE`: the last of the words in double brackets, or all that was said; None where
    it cannot be read."""
    marked = _VERDICT.findall(reply)
    if marked:
        return str(marked[-1]).lower()
    bare = _BARE.fullmatch(reply)
    return None if bare is None else bare[1].lower()


def messages_of(duel: Duel, is_swapped: bool) -> list[dict[str, str]]:
    """What the judge is asked; swapped: B's answer is the first."""
    first, second = (duel.b, duel.a) if is_swapped else (duel.a, duel.b)
    asked = "\n\n".join(f"<{turn['role']}>\n{turn['content']}\n</{turn['role']}>" for turn in duel.prompt)
    text = f"{asked}\n\n<first>\n{first}\n</first>\n\n<second>\n{second}\n</second>"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def refuse_missing_client(url: str) -> None:
    """Raise UserError where the openai package is not here."""
    if importlib.util.find_spec("openai") is None:
        raise UserError(
            f"url={url}: needs the openai package; type pip install 'rcpo[judge]', or model=MODEL for a "
            "local reward model"
        )


class Judge:
    """Asks; what is kept is not asked again."""

    def __init__(self, settings: JudgeSettings, duels: Sequence[Duel]) -> None:
        """Raises UserError where the client is not here."""
        refuse_missing_client(settings.url)
        self._settings = settings
        # Both orders of a pair of answers, one behind the other.
        self._asked = [messages_of(duel, swapped) for duel in duels for swapped in (False, True)]
        self._replies = [self._kept(messages) for messages in self._asked]

    def cost(self) -> Cost:
        waiting = self._waiting()
        letters = sum(len(turn["content"]) for idx in waiting for turn in self._asked[idx])
        return Cost(len(waiting), len(self._asked) - len(waiting), letters // CHARACTERS_PER_TOKEN)

    def ask(self, advance: Callable[[int], None]) -> list[tuple[str | None, str | None]]:
        """Verdicts of all pairs in both orders, the second with B's answer first. Raises UserError where the
        judge cannot be used; replies until then are kept."""
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
        read = [None if reply is None else verdict_of(reply) for reply in self._replies]
        if not any(read):
            said = shortened(repr(self._replies[0]))
            raise UserError(
                f"judge={settings.model}: none of its {len(read)} replies can be read, the first is {said}; "
                "give another judge"
            )
        return list(zip(read[::2], read[1::2], strict=True))

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
