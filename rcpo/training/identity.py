"""What a run's numbers depend on, by content: pairs as the model sees them, and weights.

A path says where something lies, not what it is. So run.json has these digests from a run's first start, and
a run that goes on is refused where one of them is another. Called by `rcpo.launch.start`; `rcpo.comparison`
reads the digest of the held-out pairs."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.inputs import Inputs
from rcpo.data.pairs import TokenizedPair
from rcpo.reference.cache import weights_fingerprint
from rcpo.reference.weights import own_weights, reference_model

DIGEST_BYTES = 16


def identity_of(config: ResolvedConfig, inputs: Inputs) -> dict[str, Any]:
    """Digests of training pairs, held-out pairs, the policy's initial weights and the reference's.

    A pair counts with its token ids, where its response begins and its weight, in order and after all
    filters: a template, a tokenizer or a score that has changed shows there."""
    found: dict[str, Any] = {
        "num_train_pairs": len(inputs.train),
        "train_pairs": pairs_digest(inputs.train, with_gold=True),
        "num_held_out_pairs": len(inputs.held_out),
        "held_out_pairs": pairs_digest(inputs.held_out),
        "weights": weights_fingerprint(config.model),
    }
    if own_weights(config) is not None:
        found["reference_weights"] = weights_fingerprint(reference_model(config))
    return found


def pairs_digest(pairs: Iterable[TokenizedPair], with_gold: bool = False) -> str:
    """Of tokenised pairs, in order: tokens, weights, scores of lists, pixels of images; gold responses, which
    are trained on, `with_gold`."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for pair in pairs:
        digest.update(np.float64(pair.weight).tobytes())
        if pair.scores is not None:
            digest.update(np.array(pair.scores, dtype=np.float64).tobytes())
        if pair.pictures is not None:
            digest.update(pair.pictures.digest)
        gold = [pair.gold] if with_gold and pair.gold is not None else []
        for side in (pair.chosen, pair.rejected, *gold):
            digest.update(np.array([side.num_tokens, side.num_prompt], dtype=np.int64).tobytes())
            digest.update(np.asarray(side.ids, dtype=np.int32).tobytes() + side.mask)
    return digest.hexdigest()


def refuse_other_inputs(path: str, known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError that names what is another than when the run at `path` was started."""
    changes = []
    for name, what in (("train", "training"), ("held_out", "held-out")):
        num_known, num_now = known.get(f"num_{name}_pairs"), now[f"num_{name}_pairs"]
        if num_known != num_now:
            changes.append(f"there are {num_now} {what} pairs, there were {num_known}")
        elif known.get(f"{name}_pairs") != now[f"{name}_pairs"]:
            changes.append(f"the {num_now} {what} pairs have other tokens, weights or another order")
    for name, what in (("weights", "model.path"), ("reference_weights", "reference.path")):
        both = known.get(name), now.get(name)
        is_told = all(isinstance(each, str) for each in both)
        if is_told and both[0] != both[1]:
            changes.append(f"the weights at {what} are others")
    if changes:
        raise UserError(
            f"{path}: what it was trained on has changed since it was started: {'; '.join(changes)}; put "
            "data, chat template and weights back as they were, or start a new run"
        )
