"""The split that a data set has for held-out pairs, where the config names none.

Decided once, before a run's config is frozen, so that a run from before keeps the pairs that it drew. Called
by `rcpo.launch`, `rcpo score` and `rcpo data`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from rcpo.config.schema import DataConfig
from rcpo.records.places import slices_of, training_place
from rcpo.records.readers import splits_at
from rcpo.records.selection import NOTE

NAMES = ("validation", "valid", "val", "dev", "eval", "test")
"""How such a split is called, or begins: train_prefs has test_prefs beside it. The first is preferred: test
sets are for the end."""


class HeldOutSplit(NamedTuple):
    """A data config that names its held-out split, where there is one."""

    config: DataConfig
    notes: list[str]
    """For the report: that a split was found."""


def with_held_out_split(config: DataConfig) -> HeldOutSplit:
    """`config` with data.eval_split where the data set has a split for it and the config says nothing of
    held-out pairs. Raises UserError for a data set that cannot be read."""
    says = (config.eval_path, config.eval_split, config.eval_config, config.mix)
    place = training_place(config)
    if config.path is None or any(said is not None for said in says) or len(place.paths) != 1:
        return HeldOutSplit(config, [])
    used = [each.split for each in slices_of(place)]
    name = _beside(splits_at(place), [split or "train" for split in used])
    if name is None:
        return HeldOutSplit(config, [])
    return HeldOutSplit(
        dataclasses.replace(config, eval_split=name),
        [
            f"{NOTE}data.eval_split={name}: {place.shown} has this split, so its pairs are held out; type "
            f"data.eval_split={used[0] or 'train'} to draw them from the training pairs"
        ],
    )


def _beside(known: Sequence[str], trained_on: Sequence[str]) -> str | None:
    """The split of `known` that is held out beside those that are trained on."""
    if not set(trained_on) <= set(known):  # refused where it is read
        return None
    endings = {split.removeprefix("train") for split in trained_on if split.startswith("train")}
    ending = endings.pop() if len(endings) == 1 else ""
    wanted = (f"{name}{ending}" for name in NAMES)
    return next((name for name in wanted if name in known and name not in trained_on), None)
