"""RUN/logs/rank-*.log: one file a rank, warnings of libraries included. Called first thing by
`rcpo.worker`."""

import logging
import warnings
from pathlib import Path


def log_path(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank:04d}.log"


def log_to_file(logs: Path, rank: int) -> None:
    """Send this process's log records (INFO for rcpo, WARNING for libraries) to its own file, appending."""
    handler = logging.FileHandler(log_path(logs, rank), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("rcpo").setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
