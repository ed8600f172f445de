"""`rcpo sync SWEEP|RUN`: upload what W&B wrote offline, by W&B's own `wandb sync`."""

import argparse
import subprocess
import sys
from pathlib import Path

from rcpo.commands.flags import Flags
from rcpo.common.errors import UserError


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Upload the offline W&B files of a run, or of all cells of a sweep, with `wandb sync`; a run that
was resumed is one run there too. What has been uploaded before is skipped. Needs an API key
(`wandb login`) and a network."""
    parser.epilog = """\
example:
  rcpo sync runs/dpo-on-1"""
    parser.add_argument(
        "folder", metavar="RUN|SWEEP", type=Path, help="a folder that ran with tracking.mode=offline"
    )


def run(options: argparse.Namespace) -> int:
    """Upload; returns the exit code. Raises UserError where there is nothing to upload or no key."""
    folder = options.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one of a run or a sweep")
    offline = find_offline(folder)
    if not offline:
        raise UserError(
            f"{folder}: has no offline W&B files (wandb/offline-run-*, cells/*/wandb/offline-run-*); give "
            "the folder of a run, or of a sweep, that ran with tracking.mode=offline"
        )
    from rcpo.monitor.tracking import has_key

    if not has_key():
        raise UserError("W&B: no API key is configured, so nothing can be uploaded; type `wandb login`")
    waiting = [path for path in offline if not is_synced(path)]
    print(f"{len(offline)} offline files, {len(waiting)} to upload", flush=True)
    if not waiting:
        return 0
    command = [sys.executable, "-m", "wandb", "sync", *(str(path) for path in waiting)]
    return 1 if subprocess.run(command).returncode else 0


def find_offline(folder: Path) -> list[Path]:
    """W&B's folders of offline runs in a run or in a sweep's cells, oldest first."""
    found = [*folder.glob("wandb/offline-run-*"), *folder.glob("cells/*/wandb/offline-run-*")]
    return sorted((path for path in found if path.is_dir()), key=lambda path: (path.parent, path.name))


def is_synced(path: Path) -> bool:
    """Whether W&B has left its mark that the folder was uploaded."""
    return any(path.glob("*.wandb.synced"))
