"""Rows of whole conversations (`messages`), and how one becomes a record.

A conversation is a chosen answer whose response goes on: behind its prompt, the turns before the first
assistant turn, stand that turn and all others. Which of its tokens are an assistant's is found where it is
tokenised (`rcpo.data.conversation`). Called by `rcpo.records.load`.
"""

import dataclasses
import itertools
from typing import Any

from rcpo.records.messages import BadMessageError, Messages, parsed
from rcpo.records.record import BadRowError, PreferenceRecord, read_record

MESSAGES = "messages"
"""The part of a row, in data.columns, that is a conversation."""


def read_conversation(
    messages: Any, row: int, tools: Any = None, documents: Any = None, template_kwargs: Any = None
) -> PreferenceRecord:
    """Turn a row's messages into a record of a chosen answer. Its turns end with an assistant's, and each of
    these follows a user's or a tool's. Messages may be what `read_record` reads as such. Raises
    BadRowError."""
    try:
        if isinstance(parsed(messages), str):
            raise BadRowError("messages is text, and no messages")
    except BadMessageError as error:
        raise BadRowError(f"messages {error}") from None
    try:
        record = read_record(None, messages, messages, row, tools, documents, template_kwargs, label=True)
    except BadRowError as error:
        raise BadRowError(_of_messages(str(error))) from None
    turns: Messages = [*record.prompt, *record.chosen]
    roles = [turn["role"] for turn in turns]
    for number, (before, turn) in enumerate(itertools.pairwise(turns)):
        if turn["role"] != "assistant":
            continue
        if before["role"] not in ("user", "tool"):
            raise BadRowError(f"an assistant turn follows one of the role {before['role']}, not user or tool")
        if not turn["content"].strip() and "tool_calls" not in turn:
            raise BadRowError(f"turn {number + 1} (counted from 0) of the conversation is empty")
    first = roles.index("assistant")
    if first == 0:
        raise BadRowError("the first turn is the assistant's, so that there is nothing that it answers")
    return dataclasses.replace(record, prompt=turns[:first], chosen=turns[first:], rejected=turns[first:])


def _of_messages(reason: str) -> str:
    """What is wrong with an answer and its prompt, in words of a conversation."""
    if reason.startswith("there is neither a prompt column"):
        return "there is no turn before the answer"
    if reason == "completion is empty":
        return "the last turn of the assistant is empty"
    if reason.startswith("chosen "):
        reason = f"messages {reason.removeprefix('chosen ')}"
    return reason.replace("the prompt has a system turn", "messages has a system turn")
