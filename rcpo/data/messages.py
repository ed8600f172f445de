"""Chat messages as rows hold them: which of their parts a chat template is handed, and text that is messages.

Owns what a message may carry. Does not judge a row (`rcpo.data.records`) or render (`rcpo.data.render`).
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeAlias

Messages: TypeAlias = list[dict[str, Any]]
"""Chat turns, each {"role": ..., "content": text, ...} with what else of `HANDED_ON` it has."""

HANDED_ON = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""What a message may carry beside role and content, and a template may render."""
_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


class BadMessageError(ValueError):
    """Text, or a part of a message, that cannot be read; the message says why."""


def parsed(value: Any) -> Any:
    """Messages that a file holds as text, as JSON or as Python writes them (pandas and `datasets` do so in
    CSV); anything else as it is. Raises BadMessageError for text that looks like messages and is none."""
    if not isinstance(value, str) or not _LOOKS_LIKE_MESSAGES.match(value):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list):
            return found
    raise BadMessageError("looks like messages written as text, and cannot be read as them")


def parsed_quietly(value: Any) -> Any:
    """`parsed`, and what cannot be read as it is."""
    try:
        return parsed(value)
    except BadMessageError:
        return value


def turns(messages: Iterable[dict[str, Any]]) -> Messages:
    """Role, content as text, and what of `HANDED_ON` a message has. Raises BadMessageError for content that
    is no text."""
    found = []
    for message in messages:
        turn = {"role": message["role"], "content": content_text(message.get("content"))}
        turn |= {key: message[key] for key in HANDED_ON if message.get(key) not in (None, "", [], {})}
        if isinstance(turn.get("tool_calls"), list):
            turn["tool_calls"] = [_call(call) for call in turn["tool_calls"]]
        found.append(turn)
    return found


def content_text(content: Any) -> str:
    """A message's content; text parts in one."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part) for part in content)
    raise BadMessageError("has a message whose content is not text")


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise BadMessageError(f"has a message with a part of the type {kind}, and only text is read")


def _call(call: Any) -> Any:
    """A tool call whose arguments are an object, as templates want it; OpenAI's format has them as JSON
    text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def unused_keys(rows: Iterable[Iterable[Any]]) -> Counter[str]:
    """Keys of messages that no template is handed, with the number of messages that have something there."""
    known = {"role", "content", *HANDED_ON}
    found = Counter[str]()
    for values in rows:
        for value in values:
            for message in value if isinstance(value, list) else ():
                if isinstance(message, dict):
                    found.update(
                        str(key) for key, held in message.items() if key not in known and held is not None
                    )
    return found
