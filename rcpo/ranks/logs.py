"""RUN/logs/rank-*.log: one file a rank, warnings of libraries included. Called first thing by
`rcpo.launch.worker`."""

import contextlib
import logging
import sys
import warnings
from pathlib import Path


def log_path(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank:04d}.log"


class _WarningsForUsers(logging.Handler):
    """rcpo's own warnings as one line each on whatever sys.stderr is now: a live console replaces it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:  # errors are printed by whoever ends the run
            with contextlib.suppress(OSError):
                print(f"rcpo: warning: {record.getMessage()}", file=sys.stderr, flush=True)


def log_to_file(logs: Path, rank: int) -> None:
    """Send this process's log records (INFO for rcpo, WARNING for libraries) to its own file, appending, and
    on rank 0 rcpo's own warnings to the user as well."""
    handler = logging.FileHandler(log_path(logs, rank), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    ours = logging.getLogger("rcpo")
    ours.setLevel(logging.INFO)
    ours.handlers = [_WarningsForUsers()] if rank == 0 else []
    logging.captureWarnings(True)
    warnings.simplefilter("default")
