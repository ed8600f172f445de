"""CHES of held-out pairs under the model that a run started from (arXiv 2410.08847), for the report.

`rcpo.quality.ches` computes it. Owns when that is worth it unasked, the check that the model is the run's,
and RUN/ches.json, where values that took their time are kept. Called by `rcpo.report.fallen`.
"""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import rcpo
from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically
from rcpo.comparison.groups import is_same_z
from rcpo.comparison.held_out import Origin, model_folder, origin_of, tokenized
from rcpo.comparison.load import ComparedRun, one_line

if TYPE_CHECKING:
    from rcpo.records.record import PreferenceRecord

CACHE = "ches.json"
MAX_BYTES = 1e9
"""Of weights that are loaded unasked."""
MAX_WORK = 6e12
"""Bytes of weights times tokens that are scored unasked: about a minute on one core."""
CHEAP_WORK = 5e11
"""Up to this all held-out pairs are scored, so that each has its place among them."""
WORK_PER_SECOND = 1e11
"""On one core in fp32, as measured with 135 M parameters."""
KEPT_SECONDS = 1.0
"""Values that took longer are kept."""
PAIRS_PER_BATCH = 4
WEIGHTS = ("*.safetensors", "*.bin")
ANYWAY = "type --ches yes to compute it all the same"

PairValues = tuple[float, float, float, float]
ValuesByDigest = dict[str, PairValues]
"""Digest of a record to CHES, its length-normalised form, z_w and z_l."""


class Ches(NamedTuple):
    """Of one pair."""

    ches: float
    per_token: float
    """Length-normalised."""


def ches_of_pairs(
    run: ComparedRun, records: "Sequence[PreferenceRecord]", wanted: Sequence[int], is_asked: bool
) -> dict[int, Ches] | str:
    """CHES of the run's held-out pairs by their place, at least of the `wanted`, or in words why there is
    none. `is_asked`: whatever it takes."""
    keys = [_digest(record) for record in records]
    try:
        origin = origin_of(run)
        stamp = _stamp_of(origin)
        found = _read_cache(run.path / CACHE, stamp)
        if not all(keys[idx] in found for idx in wanted):
            began = time.monotonic()
            found = _computed(origin, records, wanted, is_asked)
            if time.monotonic() - began > KEPT_SECONDS:
                _write_cache(run.path / CACHE, stamp, found)
        _check_start(run, [found.get(key) for key in keys])
    except UserError as error:
        return str(error)
    # Of models each library raises what it likes, and a report does not fail for one column of it.
    except Exception as error:
        return f"the model cannot be run here: {one_line(error)[:200] or type(error).__name__}"
    return {idx: Ches(*found[key][:2]) for idx, key in enumerate(keys) if key in found}


def _computed(
    origin: Origin, records: "Sequence[PreferenceRecord]", wanted: Sequence[int], is_asked: bool
) -> ValuesByDigest:
    """Of all records where that is cheap, else of the `wanted`. Raises UserError where it is too much to do
    unasked."""
    num_bytes = _weight_bytes(origin)
    if not is_asked:
        _check_bytes(origin, num_bytes)
    # What imports transformers takes seconds.
    import torch

    from rcpo.models.adapters import check_adapters
    from rcpo.models.load import load_model
    from rcpo.models.policy import Policy
    from rcpo.quality.ches import score_pairs

    device = "cuda" if is_asked and torch.cuda.is_available() else "cpu"
    check_adapters(origin.model)
    pairs = tokenized(origin, records)
    if [pair.row for pair in pairs] != [record.row for record in records]:
        raise UserError("the data now gives other held-out pairs than the run measured")
    work = [num_bytes * (len(pair.chosen.input_ids) + len(pair.rejected.input_ids)) for pair in pairs]
    selected = sorted(set(wanted)) if sum(work) > CHEAP_WORK else list(range(len(pairs)))
    todo = sum(work[idx] for idx in selected)
    if todo > MAX_WORK and not is_asked:
        minutes = todo / WORK_PER_SECOND / 60
        raise UserError(f"it takes about {minutes:.0f} minutes of a processor core; {ANYWAY}")
    if todo > CHEAP_WORK or is_asked:
        print(f"CHES of {len(selected)} held-out pairs under {origin.model.path}", file=sys.stderr)
    policy = Policy(load_model(origin.model, torch.device(device))).to(torch.device(device))
    # Any id pads: padding is never attended to and never scored.
    scored = score_pairs(policy, [pairs[idx] for idx in selected], 0, PAIRS_PER_BATCH)
    return {_digest(records[idx]): _as_row(values) for idx, values in zip(selected, scored, strict=True)}


def _weight_bytes(origin: Origin) -> int:
    folder = model_folder(origin.model)
    return sum(file.stat().st_size for pattern in WEIGHTS for file in folder.glob(pattern))


def _check_bytes(origin: Origin, num_bytes: int) -> None:
    """Raise UserError where the weights are not to be loaded unasked: elsewhere, or large."""
    if not origin.is_here:
        raise UserError(f"{origin.model.path} is not in a folder of this machine; {ANYWAY}")
    if num_bytes > MAX_BYTES:
        raise UserError(f"the weights of {origin.model.path} are {num_bytes / 1e9:.1f} GB; {ANYWAY}")


def _check_start(run: ComparedRun, found: Sequence[PairValues | None]) -> None:
    """Raise UserError where the log-probs of the pairs are not those that the run began with: the weights,
    the tokenizer or its template have changed since."""
    assert run.pairs is not None
    places = [idx for idx, values in enumerate(found) if values is not None]
    now = np.array([values[2:] for values in found if values is not None]).T
    start = run.pairs.start[:, places]
    if not is_same_z(start, now):
        path = run.settings.get("model.path")
        raise UserError(
            f"{path} is not what the run began with: these pairs have a mean log-probability of "
            f"{now.mean():.2f} under it, and had {start.mean():.2f}"
        )


def _digest(record: "PreferenceRecord") -> str:
    parts = json.dumps([record.prompt, record.chosen, record.rejected]).encode()
    return hashlib.blake2b(parts, digest_size=16).hexdigest()


def _stamp_of(origin: Origin) -> dict[str, Any]:
    """What the values of a record depend on; files by size and time of change."""
    folders = [model_folder(origin.model)]
    if origin.model.lora.adapter is not None:
        folders.append(Path(origin.model.lora.adapter))
    files = sorted(file for folder in folders for file in folder.glob("*") if file.is_file())
    if origin.model.chat_template not in (None, "plain"):
        files.append(Path(origin.model.chat_template))
    stamps = [[file.name, found.st_size, found.st_mtime_ns] for file in files for found in [file.stat()]]
    return {"rcpo": rcpo.__version__, "origin": repr(origin), "files": stamps}


def _read_cache(path: Path, stamp: dict[str, Any]) -> ValuesByDigest:
    """Empty where there is none for `stamp`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["source"] != stamp:
            return {}
        return {key: _as_row(row) for key, row in content["pairs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _as_row(values: Sequence[float]) -> PairValues:
    ches, ches_norm, z_w, z_l = map(float, values)
    return ches, ches_norm, z_w, z_l


def _write_cache(path: Path, stamp: dict[str, Any], found: ValuesByDigest) -> None:
    """Left out where there is no run folder, or it cannot be written."""
    if path.with_name("config.yaml").is_file():
        with contextlib.suppress(OSError):
            write_atomically(path, json.dumps({"source": stamp, "pairs": found}), by_many=True)
