"""Checkpoints: complete or absent. Written beside their place, checksummed, fsynced, renamed.

A checkpoint that takes the place of an older one of its step lets that one stand as .step-N.old until it is
there itself. A damaged one is refused, never skipped in silence: remove it to use the one before it.

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

from rcpo.distributed import barrier, from_rank_zero, rank, world_size
from rcpo.engine import Engine
from rcpo.errors import UserError
from rcpo.model import save_model
from rcpo.run_folder import RunFolder, write_atomically

REPLACED = ".old"
"""Ending of a checkpoint that is about to be replaced."""


def checkpoint_path(run: RunFolder, step: int) -> Path:
    return run.checkpoints / f"step-{step:06d}"


def newest_checkpoint(run: RunFolder) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    places = [*run.checkpoints.glob("step-*"), *run.checkpoints.glob(f".step-*{REPLACED}")]
    complete = [path for path in places if (path / "manifest.json").is_file()]
    return max(complete, key=_step_and_age, default=None)


def _step_and_age(path: Path) -> tuple[int, bool]:
    """Sorts by step, and puts a replaced checkpoint before the one that took its place."""
    digits = path.name.removeprefix(".").removeprefix("step-").removesuffix(REPLACED)
    return (int(digits) if digits.isdecimal() else -1, not path.name.endswith(REPLACED))


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
    _check_on_rank_zero(path)
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


def _check_on_rank_zero(path: Path) -> None:
    """`check_manifest`, by one rank for all: reading a checkpoint once from a shared disk is enough.
    Collective."""
    fault = None
    if rank() == 0:
        try:
            check_manifest(path)
        except UserError as error:
            fault = str(error)
    fault = from_rank_zero(fault)
    if fault is not None:
        raise UserError(fault)


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
    for folder in (beside, *(file for file in beside.rglob("*") if file.is_dir())):
        _fsync(folder)
    old = place.with_name(f".{place.name}{REPLACED}")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
    os.replace(beside, place)
    _fsync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
