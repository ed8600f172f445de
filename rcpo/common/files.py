"""Files that several rooms write: replaced whole or not at all, and where the user's cache is."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)


def cache_dir() -> Path:
    """RCPO_CACHE, else the XDG cache folder's rcpo."""
    if "RCPO_CACHE" in os.environ:
        return Path(os.environ["RCPO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rcpo"
