"""Checkpoints: complete or absent. Written beside their place, checksummed, fsynced, renamed.

A checkpoint that takes the place of an older one of its step lets that one stand as .step-N.old until it is
there itself. A damaged one is reported, and the newest whole one is used.

checkpoints/step-000100/engine/...   DeepSpeed's files: weights, optimizer, schedule
                        state.json   step, calibrator, batch statistics, world size, ZeRO stage
                        rng/rank-*   random-number states
                        scores/rank-*  sums over measurements (metrics.population)
                        reference.safetensors  weights of a reference that moves (reference.sync_every)
                        model/       a Hugging Face model folder: an export is a copy of it
                        manifest.json  size and SHA-256 of every other file
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import SaveError, UserError, first_line
from rcpo.common.files import (
    REPLACED,
    FileEntry,
    entry_of,
    path_beside,
    put_in_place,
    sha256,
    write_atomically,
)
from rcpo.engine.engine import Engine
from rcpo.models.load import save_model
from rcpo.ranks.distributed import done_by_rank_zero, gather, rank, world_size
from rcpo.runs.folder import RunFolder

logger = logging.getLogger(__name__)


REFERENCE = "reference.safetensors"


def checkpoint_path(run: RunFolder, step: int) -> Path:
    return run.checkpoints / f"step-{step:06d}"


def complete_checkpoints(run: RunFolder) -> list[Path]:
    """The checkpoints that have a manifest, the newest first; what the manifest says is not checked."""
    places = [*run.checkpoints.glob("step-*"), *run.checkpoints.glob(f".step-*{REPLACED}")]
    complete = [path for path in places if (path / "manifest.json").is_file()]
    return sorted(complete, key=_step_and_age, reverse=True)


def newest_checkpoint(run: RunFolder) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return next(iter(complete_checkpoints(run)), None)


def checkpoint_to_resume(run: RunFolder) -> Path | None:
    """The newest whole checkpoint, with a warning for each newer one that is damaged; None where there never
    was one. By one rank for all: reading a checkpoint once from a shared disk is enough. Collective.

    Raises UserError where all are damaged.
    """
    return done_by_rank_zero(lambda: _newest_whole(run))


def _newest_whole(run: RunFolder) -> Path | None:
    unfinished = [path for path in run.checkpoints.glob("step-*") if not (path / "manifest.json").is_file()]
    for path in unfinished:
        logger.warning("%s: has no manifest.json, so it is not used", path)
    damaged = len(unfinished)
    for path in complete_checkpoints(run):
        try:
            check_manifest(path)
        except UserError as error:
            logger.warning("%s; looking for the one before it", error)
            damaged += 1
            continue
        if damaged:
            logger.warning("%s: is the newest whole checkpoint, and the run goes on from there", path)
        return path
    if damaged:
        raise UserError(
            f"{run.checkpoints}: none of its {damaged} checkpoints is whole; remove them to start again from "
            "the first step"
        )
    return None


def step_of(path: Path) -> int:
    """The optimizer step that a checkpoint's name says; -1 where it says none."""
    digits = path.name.removeprefix(".").removeprefix("step-").removesuffix(REPLACED)
    return int(digits) if digits.isdecimal() else -1


def _step_and_age(path: Path) -> tuple[int, bool]:
    """Sorts by step, and puts a replaced checkpoint before the one that took its place."""
    return step_of(path), not path.name.endswith(REPLACED)


def save_checkpoint(
    run: RunFolder,
    engine: Engine,
    train_state: dict[str, Any],
    scores: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    keep_last: int | None = None,
    reference: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Path:
    """Write engine, `train_state` (JSON; its "step" names the folder), this rank's `scores` and rank 0's
    weights of a moving `reference`; returns the folder. Of the older checkpoints all but `keep_last` - 1 are
    removed. Collective.

    Raises SaveError on every rank when any could not write; nothing of the new one is left then.
    """
    place = checkpoint_path(run, train_state["step"])
    beside = path_beside(place)
    with _all_or_nothing(beside, place):
        if rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
            for folder in ("rng", "scores"):
                (beside / folder).mkdir(parents=True)
    written: dict[Path, FileEntry] = {}
    with _all_or_nothing(beside, place):
        written |= engine.save(beside)
        for folder, tensors in (("rng", _rng_state()), ("scores", scores)):
            if tensors:
                save_file(tensors, file := _of_rank(beside / folder))
                written[file] = entry_of(file)
    weights = engine.whole_weights()
    known = {str(file.relative_to(beside)): entry for each in gather(written) for file, entry in each.items()}

    def complete() -> None:
        save_model(engine.policy.model, weights or {}, tokenizer, beside / "model")
        state = train_state | {"world_size": world_size(), "stage": engine.stage}
        write_atomically(beside / "state.json", json.dumps(state, indent=2))
        if reference:
            save_file(dict(reference), beside / REFERENCE)
        _complete(beside, place, known)
        if keep_last is not None:
            for path in complete_checkpoints(run)[keep_last:]:
                shutil.rmtree(path, ignore_errors=True)

    with _all_or_nothing(beside, place):
        done_by_rank_zero(complete)
    return place


@contextlib.contextmanager
def _all_or_nothing(beside: Path, place: Path) -> Iterator[None]:
    """Raise SaveError on every rank when any rank's writing fails, and remove the files. Collective at its
    end.

    torch.save turns a full disk into a RuntimeError.
    """
    fault = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        fault = getattr(error, "strerror", None) or first_line(error)
        logger.error("rank %d could not write %s: %s", rank(), beside, error)
    faults = [f"rank {number}: {said}" for number, said in enumerate(gather(fault)) if said]
    if not faults:
        return
    if rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
    free = shutil.disk_usage(beside.parent).free / 1e9
    raise SaveError(
        f"{place}: the checkpoint of step {step_of(place)} could not be written ({faults[0][:200]}; "
        f"{free:.1f} GB are free); the ones before it are whole"
    )


def load_checkpoint(path: Path, engine: Engine) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Put engine and random numbers back as they were; returns state.json's content and this rank's scores.
    Collective.

    Raises UserError when the checkpoint was written by another number of ranks or ZeRO stage and DeepSpeed
    cannot convert it.
    """
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    is_same = (state["world_size"], state["stage"]) == (world_size(), engine.stage)
    if is_same:
        engine.load(path)
    else:
        refuse_unloadable(path, world_size(), engine.stage, engine.optimizer)
        engine.load_converted(path)
    rng = _of_rank(path / "rng")
    if rng.is_file():
        states = load_file(rng)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    scores = _of_rank(path / "scores")
    return state, load_file(scores) if is_same and scores.is_file() else {}


def refuse_unloadable(path: Path, num_ranks: int, stage: int, optimizer: str) -> None:
    """Raise UserError where a checkpoint cannot be loaded by `num_ranks` ranks at ZeRO `stage`.

    DeepSpeed's universal format spreads stages 1 and 2 over any number of ranks and onto each other, and 3
    over any number; stage 0 is whole on every rank. Of optimizers it knows AdamW's state alone.
    """
    state = json.loads((path / "state.json").read_text())
    before = state["stage"]
    if (state["world_size"], before) == (num_ranks, stage):
        return
    if optimizer != "adamw" and max(stage, before) > 0:
        raise UserError(
            f"{path}: was written by {state['world_size']} ranks at ZeRO {before} with optim={optimizer}, "
            f"and DeepSpeed shares out AdamW's state alone anew; resume on {state['world_size']} ranks with "
            f"deepspeed.stage={before}"
        )
    if not any(before in kind and stage in kind for kind in ((0,), (1, 2), (3,))):
        raise UserError(
            f"{path}: was written by {state['world_size']} ranks at ZeRO {before}, and DeepSpeed "
            f"cannot turn that into {num_ranks} at ZeRO {stage}; resume with deepspeed.stage={before} "
            "(stages 1 and 2 turn into each other, every stage into more or fewer ranks)"
        )


def _of_rank(folder: Path) -> Path:
    return folder / f"rank-{rank():04d}.safetensors"


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


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


HASHED_AT_ONCE = 8
"""Files: hashing one keeps a core busy, and nothing else."""


def _complete(beside: Path, place: Path, known: Mapping[str, FileEntry] = MappingProxyType({})) -> None:
    """Checksum and rename: from here on the checkpoint exists. What is `known` already was hashed by the rank
    that wrote it."""
    names = (str(file.relative_to(beside)) for file in beside.rglob("*") if file.is_file())
    rest = [name for name in names if name not in known]
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        entries = dict(zip(rest, pool.map(lambda name: entry_of(beside / name), rest), strict=True))
    manifest = dict(sorted((entries | dict(known)).items()))
    write_atomically(beside / "manifest.json", json.dumps(manifest, indent=2))
    put_in_place(beside, place)
