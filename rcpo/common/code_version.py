"""Which code this is: a hash of rcpo's own Python files, and the git commit where there is one.

Both go into run.json, so that a run that goes on, or a queued cell that starts, under other code can say so.
"""

import functools
import hashlib
import subprocess
from pathlib import Path

import rcpo

HASH_LETTERS = 16


@functools.cache
def code_hash() -> str:
    """Hash of the names and contents of rcpo's *.py files; conf/ is not part of it, since runs have frozen
    configs."""
    package = Path(rcpo.__file__).resolve().parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:HASH_LETTERS]


@functools.cache
def git_commit() -> str | None:
    """Commit of rcpo's own source tree, with -dirty when it has changes; None where it is not a git
    checkout."""
    folder = Path(rcpo.__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
