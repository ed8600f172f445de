"""Chat messages as rows hold them: which of their parts a chat template is handed, and text that is messages.

Owns what a message may carry. Does not judge a row (`rcpo.records.record`) or render (`rcpo.data.render`).
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeAlias

Messages: TypeAlias = list[dict[str, Any]]
"""Chat turns, each {"role": ..., "content": text, ...} with what else of `HANDED_ON` it has."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a prompt may hold; a response is one assistant turn."""
HANDED_ON = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""What a message may carry beside role and content, and a template may render."""
PLACE = "\ufdd0"
"""Stands in a message's text where an image stands: a noncharacter of Unicode, which no text has."""
FROM_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "assistant", "observation": "tool",
}  # fmt: skip
"""ShareGPT's and LLaMA-Factory's names of roles; others are as they are."""
_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
_MAY_BE_MESSAGES = re.compile(r"""\s*\[?\s*\{.*["'](role|from)["']\s*:""", re.DOTALL)
"""One message alone, or messages whose first key is another one; an answer in JSON too, so their roles
decide."""


class BadMessageError(ValueError):
    """Text, or a part of a message, that cannot be read; the message says why."""


def parsed(value: Any) -> Any:
    """Messages that a file holds as text, as JSON or as Python writes them (pandas and `datasets` do so in
    CSV), and ShareGPT's, as messages with role and content; a message alone as a list of it. Anything else
    as it is. Raises BadMessageError for text that looks like messages and is none."""
    if isinstance(value, dict) and ("role" in value or _is_sharegpt(value)):
        value = [value]
    if isinstance(value, list):
        return [_from_sharegpt(each) if _is_sharegpt(each) else each for each in value]
    if not isinstance(value, str) or not (_LOOKS_LIKE_MESSAGES.match(value) or _MAY_BE_MESSAGES.match(value)):
        return value
    found = spelled(value)
    if _LOOKS_LIKE_MESSAGES.match(value):
        if isinstance(found, list):
            return parsed(found)
        raise BadMessageError("looks like messages written as text, and cannot be read as them")
    return parsed(_listed(found)) if found and all(map(_has_known_role, _listed(found))) else value


def spelled(text: str) -> Any:
    """The value that a text spells, as JSON or as Python writes it (pandas and `datasets` do so in CSV); None
    where it spells none."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _has_known_role(message: Any) -> bool:
    if _is_sharegpt(message):
        return message["from"] in (*FROM_ROLES, *ROLES)
    has_content = isinstance(message, dict) and ("content" in message or "tool_calls" in message)
    return has_content and message.get("role") in ROLES


def _is_sharegpt(message: Any) -> bool:
    return isinstance(message, dict) and "from" in message and "value" in message and "role" not in message


def _from_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    """Role and content of a message with from and value; a function_call's value is its calls in JSON."""
    others = {key: held for key, held in message.items() if key not in ("from", "value")}
    role, value = FROM_ROLES.get(str(message["from"]), message["from"]), message["value"]
    if message["from"] != "function_call":
        return {"role": role, "content": value, **others}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise BadMessageError("has a function_call that is not JSON with name and arguments")
    tool_calls = [{"type": "function", "function": call} for call in calls]
    return {"role": role, "content": "", "tool_calls": tool_calls, **others}


def num_sharegpt(values: Iterable[Any]) -> int:
    """How many of these values hold messages with from and value."""
    num = 0
    for value in values:
        if isinstance(value, str) and (match := _LOOKS_LIKE_MESSAGES.match(value)):
            num += match[1] in ("from", "value")
            continue
        if isinstance(value, str):
            found = _listed(spelled(value) if _MAY_BE_MESSAGES.match(value) else None)
            value = found if all(map(_has_known_role, found)) else None
        num += any(map(_is_sharegpt, _listed(value)))
    return num


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


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
    if kind == "image":
        return PLACE
    raise BadMessageError(f"has a message with a part of the type {kind}, and only text and images are read")


def parts_of(text: str) -> list[dict[str, str]]:
    """A message's content as a list of parts, with one for each place of an image."""
    first, *others = text.split(PLACE)
    parts = [{"type": "text", "text": first}] if first else []
    for other in others:
        parts.append({"type": "image"})
        if other:
            parts.append({"type": "text", "text": other})
    return parts


def in_parts(prompt: str | Messages) -> str | Messages:
    """A prompt as files have it: content in parts where it has a place of an image."""
    if isinstance(prompt, str):
        return prompt
    return [
        {**turn, "content": parts_of(turn["content"])} if PLACE in turn["content"] else turn
        for turn in prompt
    ]


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


def without_system(prompt: Messages, how: str) -> Messages:
    """The turns with the system turn at their head folded into the first user turn ("merge": its text, a
    blank line, the user's), left out ("drop"), or as they are ("keep"). A system turn without a user turn
    behind it stays."""
    if how == "keep" or prompt[0]["role"] != "system" or len(prompt) < 2:
        return prompt
    system, first, *rest = prompt
    if how == "drop":
        return [first, *rest]
    if first["role"] != "user":
        return prompt
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


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
