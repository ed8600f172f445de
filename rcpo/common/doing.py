"""What is being done before a run has anything to show: one line of standard error, on a terminal alone.

The next one replaces it, and the first output removes it. Loads nothing: it is there at once.

In a file or a pipe nothing is written: what is refused stays the only line there.
"""

import os
import sys

_ERASE = "\r\x1b[2K"
_shown = False


def doing(what: str) -> None:
    """Show `what` in place of what was shown before."""
    global _shown
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        # The cursor goes back to the start, so that what others write lies over the line.
        sys.stderr.write(f"{_ERASE}{what} ...\r")
        sys.stderr.flush()
        _shown = True


def done_doing() -> None:
    """Remove what is shown."""
    global _shown
    if _shown:
        sys.stderr.write(_ERASE)
        sys.stderr.flush()
        _shown = False
