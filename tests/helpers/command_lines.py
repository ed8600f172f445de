"""Many command lines, each in a forked child, and what every one did to the folder that it ran in."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers import forked

SECONDS_PER_CASE = 60


@dataclass(frozen=True)
class Answer:
    """What one command line did."""

    code: int
    output: str
    said: str
    """Standard error."""
    changes: list[str]
    """Files and folders that it made, changed or removed in its working directory, by relative path."""
    folder: Path
    """Its working directory."""


class _Lane:
    """A folder, and the command line that runs in it."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder, self._env = folder, env
        self._contents = contents(folder)
        self._child: forked.Child | None = None
        self._name, self._deadline = "", 0.0

    def start(self, name: str, words: Sequence[str]) -> None:
        self._name, self._deadline = name, time.monotonic() + SECONDS_PER_CASE
        self._child = forked.start_rcpo(*words, cwd=self._folder, env=self._env)

    def is_free(self) -> bool:
        return self._child is None

    def ended(self) -> tuple[str, Answer] | None:
        """Name and answer of a command line that has just ended."""
        if self._child is None:
            return None
        if self._child.poll() is None and time.monotonic() < self._deadline:
            return None
        done = self._child.completed(max(0.0, self._deadline - time.monotonic()))
        before, self._contents = self._contents, contents(self._folder)
        names = before.keys() | self._contents.keys()
        changes = sorted(name for name in names if before.get(name) != self._contents.get(name))
        self._child = None
        return self._name, Answer(done.returncode, done.stdout, done.stderr, changes, self._folder)


def run_all(
    cases: Mapping[str, Sequence[str]], folders: Sequence[Path], env: Mapping[str, str]
) -> dict[str, Answer]:
    """Run every command line, as many at a time as there are folders; in one folder they run in order."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    lanes = [_Lane(folder, environment | env) for folder in folders]
    waiting, answers = list(cases.items()), dict[str, Answer]()
    while len(answers) < len(cases):
        for lane in lanes:
            if lane.is_free() and waiting:
                lane.start(*waiting.pop(0))
        forked.server().listen(1)
        answers |= dict(filter(None, (lane.ended() for lane in lanes)))
    return answers


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, with what would change if it were touched."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        kind = "folder" if path.is_dir() else f"{stat.st_size} bytes, {stat.st_mtime_ns}, inode {stat.st_ino}"
        found[str(path.relative_to(folder))] = kind
    return found
