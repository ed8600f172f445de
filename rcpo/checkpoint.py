"""Checkpoints: complete or absent. Written beside their place, checksummed, fsynced, renamed.

checkpoints/step-000100/engine/...   DeepSpeed's files: weights, optimizer, schedule
                        state.json   step, calibrator, batch statistics, world size, ZeRO stage
                        rng/rank-*   random-number states
                        model/       a Hugging Face model folder: an export is a copy of it
                        manifest.json  size and SHA-256 of every other file
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from rcpo.distributed import barrier, rank, world_size
from rcpo.engine import Engine
from rcpo.errors import UserError
from rcpo.model import save_model
from rcpo.run_folder import RunFolder, write_atomically


def checkpoint_path(run: RunFolder, step: int) -> Path:
    return run.checkpoints / f"step-{step:06d}"


def newest_checkpoint(run: RunFolder) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    complete = [path for path in run.checkpoints.glob("step-*") if (path / "manifest.json").is_file()]
    # Longer names first: from step 1000000 on a name has more than the six digits.
    return max(complete, key=lambda path: (len(path.name), path.name), default=None)


def save_checkpoint(
    run: RunFolder,
    engine: Engine,
    train_state: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """Write engine and `train_state` (JSON; its "step" names the folder); returns the folder. Collective."""
    place = checkpoint_path(run, train_state["step"])
    beside = place.with_name(f".{place.name}.tmp")
    if rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        (beside / "rng").mkdir(parents=True)
    barrier()
    engine.save(beside)
    save_file(_rng_state(), beside / "rng" / f"rank-{rank():04d}.safetensors")
    weights = engine.whole_weights()
    barrier()
    if weights is not None:
        save_model(engine.policy.model, weights, tokenizer, beside / "model")
        state = train_state | {"world_size": world_size(), "stage": engine.stage}
        write_atomically(beside / "state.json", json.dumps(state, indent=2))
        _complete(beside, place)
    barrier()
    return place


def load_checkpoint(path: Path, engine: Engine) -> dict[str, Any]:
    """Put engine and random numbers back as they were; returns state.json's content. Collective.

    Raises UserError when the checkpoint is damaged or was written by another number of ranks or ZeRO stage.
    """
    check_manifest(path)
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    if (state["world_size"], state["stage"]) != (world_size(), engine.stage):
        raise UserError(
            f"{path}: was written by {state['world_size']} ranks at ZeRO {state['stage']}, this run has "
            f"{world_size()} at ZeRO {engine.stage}; resume with the same"
        )
    engine.load(path)
    rng = load_file(path / "rng" / f"rank-{rank():04d}.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    return state


def check_manifest(path: Path) -> None:
    """Raise UserError when a file of the checkpoint is missing or differs from its manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{path}: manifest.json is missing or damaged; remove this checkpoint to use the one before it"
        ) from None
    for name, entry in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            raise UserError(
                f"{path}: {name} is missing or damaged; remove this checkpoint to use the one before it"
            )


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _complete(beside: Path, place: Path) -> None:
    """Checksum, fsync and rename: from here on the checkpoint exists."""
    files = sorted(file for file in beside.rglob("*") if file.is_file())
    manifest = {}
    for file in files:
        manifest[str(file.relative_to(beside))] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        _fsync(file)
    write_atomically(beside / "manifest.json", json.dumps(manifest, indent=2))
    if place.exists():
        shutil.rmtree(place)
    os.replace(beside, place)
    _fsync(place.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
