"""Reference log-probabilities: computed once from the initial weights, kept, and shared between runs.

A row's key is its token ids and response mask; a file's key is the weights and the dtype, and nothing else:
not the learning rate, not the seed, not the output folder, so that every cell of a grid finds what the first
one computed. The run folder holds a copy, so that a resumed run never asks trained weights for their
reference.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from filelock import UnixFileLock
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from rcpo.common.files import cache_dir, replacing
from rcpo.common.locks import kernel_lock
from rcpo.config.schema import ModelConfig
from rcpo.data.pairs import SideLogProbs
from rcpo.data.tokenize import TokenizedPair, TokenizedSide
from rcpo.models.adapter_files import below_fingerprint
from rcpo.models.hub import is_hub_id
from rcpo.models.load import model_place
from rcpo.ranks.distributed import from_rank_zero

logger = logging.getLogger(__name__)

KEY_BYTES = 16
"""Length of a row key (BLAKE2b): a collision among 10^9 rows has a chance below 10^-20."""
SECONDS_BETWEEN_SIGNS = 20.0
"""How often a rank 0 that waits for its turn tells the others: far below a collective's time limit."""


def weights_fingerprint(config: ModelConfig) -> str:
    """Hash of the model's weight and config files (with its code, where that is trusted) and its dtype; for a
    hub model, of its id and commit.
    An adapter below the trained one counts; the trained one does not, since it starts without effect."""
    digest = hashlib.blake2b(config.dtype.encode(), digest_size=KEY_BYTES)
    digest.update(below_fingerprint(config))
    source = Path(model_place(config.path, config.allow_pickle, revision=config.revision))
    if is_hub_id(config.path):
        digest.update(f"{config.path}@{source.name}".encode())
        return digest.hexdigest()
    code = source.glob("*.py") if config.trust_remote_code else ()
    pickled = source.glob("*.bin") if config.allow_pickle else ()
    for file in sorted([source / "config.json", *source.glob("*.safetensors"), *pickled, *code]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def side_key(side: TokenizedSide) -> bytes:
    """Key of one tokenised side: its ids, where the response begins, and what of it is scored."""
    content = np.empty(1 + side.num_tokens, dtype=np.int64)
    content[0], content[1:] = side.num_prompt, side.ids
    return hashlib.blake2b(content.tobytes() + side.mask, digest_size=KEY_BYTES).digest()


class ReferenceCache:
    """z of rows under one set of weights: a safetensors file of keys (n, 16) uint8 and values (n,) fp32."""

    def __init__(self, fingerprint: str) -> None:
        self.path = cache_dir() / "reference" / f"{fingerprint}.safetensors"

    def read(self) -> dict[bytes, float]:
        """Everything known so far; empty when the file is absent, or with a warning when it is unreadable: it
        can always be computed again."""
        if not self.path.is_file():
            return {}
        try:
            # One read of one file: load_file opens the path twice, and a merge may come between.
            tensors = load(self.path.read_bytes())
            keys = tensors["keys"].numpy().tobytes()
            starts = range(0, len(keys), KEY_BYTES)
            return dict(zip((keys[i : i + KEY_BYTES] for i in starts), tensors["z"].tolist(), strict=True))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            logger.warning("%s cannot be read (%s): it is computed again and replaced", self.path, error)
            return {}

    def merge(self, rows: dict[bytes, float]) -> None:
        """Add rows; atomic. Call with the lock held: another run's rows could be lost otherwise."""
        if not rows:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        merged = self.read() | rows
        keys = torch.frombuffer(bytearray(b"".join(merged)), dtype=torch.uint8).view(-1, KEY_BYTES)
        z = torch.tensor(list(merged.values()), dtype=torch.float32)
        with replacing(self.path, by_many=True) as beside:
            save_file({"keys": keys, "z": z}, beside)

    def lock(self) -> UnixFileLock:
        """Held from reading to merging; see `kernel_lock`."""
        return kernel_lock(self.path.with_suffix(".lock"))


def pair_keys(pair: TokenizedPair) -> tuple[bytes, bytes]:
    """Keys of both sides, whatever they are scored beside; by the pixels of their images too."""
    keys = side_key(pair.chosen), side_key(pair.rejected)
    if pair.pictures is None:
        return keys
    seen = pair.pictures.digest
    chosen, rejected = (hashlib.blake2b(key + seen, digest_size=KEY_BYTES).digest() for key in keys)
    return chosen, rejected


def place_keys(kind: str, pairs: Sequence[TokenizedPair]) -> list[tuple[bytes, bytes]]:
    """Keys of both sides of each pair by all that goes through the model with them: by its pairs in their
    order, by the place among them, and by the `kind` of layout."""
    whole = hashlib.blake2b(kind.encode(), digest_size=KEY_BYTES)
    for pair in pairs:
        whole.update(b"".join(pair_keys(pair)))

    def key(place: int, side: str) -> bytes:
        content = whole.digest() + f"{place} {side}".encode()
        return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()

    return [(key(place, "w"), key(place, "l")) for place in range(len(pairs))]


class HasRow(Protocol):
    """What is scored: a pair, by itself or in a micro-batch."""

    @property
    def row(self) -> int: ...


Scorable = TypeVar("Scorable", bound=HasRow)


def shared_reference(
    cache: ReferenceCache | None,
    pairs: Sequence[Scorable],
    compute: Callable[[Sequence[Scorable]], SideLogProbs],
    keys_of: Callable[[Scorable], tuple[bytes, bytes]] = pair_keys,  # type: ignore[assignment]
) -> tuple[SideLogProbs, int]:
    """(ref_w, ref_l) of `pairs` from the cache, and how many sides had to be computed. Collective.

    `cache` is rank 0's; the other ranks give None. One lock is held from reading through computing to
    merging, so that the cells of a grid that start together compute each pair once: the first does, the
    others wait.
    A cache that cannot be written is a warning: the run computes for itself alone.
    """
    keys = {key for pair in pairs for key in keys_of(pair)}

    def read() -> dict[bytes, float]:
        known = {} if cache is None else cache.read()
        wanted: dict[bytes, float] = from_rank_zero({key: known[key] for key in keys if key in known})
        return wanted

    known = read()
    if len(known) == len(keys):
        return reference_logprobs(pairs, known, compute, keys_of)[0], 0
    with ExitStack() as stack:
        _wait_for_turn(cache, stack)
        values, fresh = reference_logprobs(pairs, read(), compute, keys_of)
        if cache is not None and fresh:
            try:
                cache.merge(fresh)
            except (OSError, SafetensorError) as error:
                logger.warning(
                    "%s cannot be written (%s): other runs will compute it again", cache.path, error
                )
    return values, len(fresh)


def _wait_for_turn(cache: ReferenceCache | None, stack: ExitStack) -> None:
    """Take the cache's lock into `stack` on rank 0. Collective: the others hear from rank 0 all along,
    because a silent wait would outlast the time limit of a collective."""
    lock = None if cache is None else cache.lock()
    num_waits = 0
    while True:
        has_turn = True
        if lock is not None:
            try:
                stack.enter_context(lock.acquire(timeout=SECONDS_BETWEEN_SIGNS))
            except TimeoutError:
                has_turn = False
            except OSError as error:  # no such folder can be made, or a file system without locks
                logger.warning(
                    "%s cannot be locked (%s): other runs may compute the same", lock.lock_file, error
                )
        if from_rank_zero(has_turn):
            return
        if num_waits == 0:
            logger.info("another run computes reference log-probs of this model; waiting for it")
        num_waits += 1


def reference_logprobs(
    pairs: Sequence[Scorable],
    known: dict[bytes, float],
    compute: Callable[[Sequence[Scorable]], SideLogProbs],
    keys_of: Callable[[Scorable], tuple[bytes, bytes]] = pair_keys,  # type: ignore[assignment]
) -> tuple[SideLogProbs, dict[bytes, float]]:
    """(ref_w, ref_l) of `pairs`, from `known` rows where both sides are there, else from one `compute` of the
    rest.

    Returns the newly computed rows too. `known` must be the same on every rank.
    """
    keys = [keys_of(pair) for pair in pairs]
    missing = [idx for idx, sides in enumerate(keys) if not all(key in known for key in sides)]
    fresh: dict[bytes, float] = {}
    if missing:
        computed = compute([pairs[idx] for idx in missing])
        for idx, z_w, z_l in zip(missing, computed.z_w.tolist(), computed.z_l.tolist(), strict=True):
            if not (math.isfinite(z_w) and math.isfinite(z_l)):
                raise RuntimeError(
                    f"data row {pairs[idx].row}: reference log-probs are {z_w} and {z_l}, "
                    "which must be finite"
                )
            fresh[keys[idx][0]], fresh[keys[idx][1]] = z_w, z_l
    table = known | fresh
    ref_w = torch.tensor([table[chosen] for chosen, _ in keys], dtype=torch.float32)
    ref_l = torch.tensor([table[rejected] for _, rejected in keys], dtype=torch.float32)
    return SideLogProbs(ref_w, ref_l), fresh
