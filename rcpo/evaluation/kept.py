"""Results of the models that runs start from, kept in RCPO_CACHE/evaluation: one evaluation for a whole grid,
whichever process asks first.

By content of weights and settings. What cannot be read or written is asked again."""

import contextlib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rcpo.common.files import cache_dir, write_atomically
from rcpo.evaluation.results import TaskResult, result_of

Found = tuple[TaskResult, list[dict[str, Any]]]
"""Scores, and a row a question."""


def kept(key: str) -> Found | None:
    """What was kept for the same weights, settings and task."""
    try:
        tree = json.loads(_file(key).read_text(encoding="utf-8"))
        return result_of(tree["result"]), list(tree["questions"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(key: str, found: Found) -> None:
    file, (result, questions) = _file(key), found
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"result": asdict(result), "questions": questions}))


def _file(key: str) -> Path:
    return cache_dir() / "evaluation" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
