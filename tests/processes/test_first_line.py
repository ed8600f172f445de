"""What a terminal shows of `rcpo train` before its first step: something at once, and nothing of it stays."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path


def seen_on_a_terminal(folder: Path, *words: str) -> str:
    """All that `rcpo` writes to a terminal."""
    main, other = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "rcpo.cli", *words],
        cwd=folder, stdin=other, stdout=other, stderr=other, env=os.environ | {"TERM": "xterm"},
    ):  # fmt: skip
        os.close(other)
        seen = b""
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
    os.close(main)
    return seen.decode()


def test_a_refused_word_removes_what_was_being_done(tmp_path: Path) -> None:
    seen = seen_on_a_terminal(tmp_path, "train", "optim.lr=fast")
    assert seen.startswith("\r\x1b[2Kreading the words ...\r"), seen
    last = re.split(r"\x1b\[2K", seen)[-1]
    assert last.startswith("rcpo: optim.lr=fast: must be ")
    assert last.count("\n") == 1
