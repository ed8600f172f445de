"""Preference records: the one shape every data source is read into."""

from dataclasses import dataclass
from typing import TypeAlias

Messages: TypeAlias = list[dict[str, str]]
"""Chat turns, each {"role": ..., "content": ...}."""


@dataclass(frozen=True)
class PreferenceRecord:
    """One preference pair. Either all three parts are plain text, or all three are messages."""

    prompt: str | Messages
    chosen: str | Messages
    """The response only, without the prompt."""
    rejected: str | Messages
    """The response only, without the prompt."""
    row: int
    """Row number in the source, counted from 0, for reports."""
