"""The third response of a row, its gold one, of which a likelihood term is (objective.sft_of=gold).

Owns what makes it unfit. Called by `rcpo.records.load`, for training and held-out rows alike.
"""

import dataclasses
from typing import Any

from rcpo.records.record import BadRowError, PreferenceRecord, as_messages, read_record

GOLD = "gold"
"""The part of a row, in data.columns."""


def with_gold(record: PreferenceRecord, prompt: Any, gold: Any) -> PreferenceRecord:
    """The record of a pair with the gold response to its prompt; it may be the chosen one. Raises
    BadRowError."""
    if record.label is not None or record.scores:
        raise BadRowError(
            "a gold response stands beside a pair alone; rows of pairs have prompt, chosen, rejected"
        )
    if prompt is None:
        raise BadRowError("a gold response needs a prompt of its own, and the sides only begin alike")
    if gold is None:
        raise BadRowError("gold is null")
    try:
        read = read_record(prompt, gold, gold, record.row, label=True)
    except BadRowError as error:
        reason = str(error)
        for word in ("chosen", "completion"):
            reason = f"gold {reason.removeprefix(f'{word} ')}" if reason.startswith(f"{word} ") else reason
        raise BadRowError(reason) from None
    if isinstance(read.prompt, str) and not isinstance(record.prompt, str):
        read = as_messages(read, has_prompt=True)
    if read.prompt != record.prompt:
        raise BadRowError("the gold response does not share the prompt of the pair")
    return dataclasses.replace(record, gold=read.chosen)
