"""What is not asked twice, by whichever process: RCPO_CACHE/KIND, a JSON file for each key.

Keys are content: weights and settings of scores, messages and settings of a judge's replies. What cannot be
read or written is asked again."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rcpo.common.files import cache_dir, write_atomically
from rcpo.common.locks import turn_at


def kept(kind: str, key: str) -> dict[str, Any] | None:
    """What was kept under the same key."""
    try:
        tree = json.loads(_file(kind, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def keep(kind: str, key: str, tree: dict[str, Any]) -> None:
    file = _file(kind, key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(tree), by_many=True)


@contextlib.contextmanager
def turn(kind: str, key: str) -> Iterator[None]:
    """While open, no other process looks for the same key or makes it: what it made is there then. Where no
    lock can be had, nobody waits."""
    file = _file(kind, key).with_suffix(".lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(turn_at(file))
        yield


def _file(kind: str, key: str) -> Path:
    return cache_dir() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
