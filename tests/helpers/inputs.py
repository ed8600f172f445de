"""Configs and rows for what reads the data of a run."""

from typing import Any

import pytest

from rcpo.common.errors import UserError
from rcpo.config.resolve import resolve
from rcpo.config.schema import Config
from rcpo.config.validate import validate
from rcpo.training.read_inputs import read_inputs


def config_of(**groups: dict[str, Any]) -> Config:
    """The embedded model with 40 word problems, 10 of them held out, and entries of `groups` over that."""
    tree: dict[str, Any] = {
        "objective": {"name": "dpo"}, "calibration": {"name": "on"}, "model": {"path": "builtin:tiny"},
        "data": {"source": "arithmetic", "train_pairs": 30, "eval_pairs": 10},
        "optim": {"name": "adamw"}, "deepspeed": {}, "tracking": {"name": "none"},
        "train": {"device": "cpu", "pairs_per_step": 4}, "metrics": {}, "launch": {},
    }  # fmt: skip
    tree = {group: {**values, **groups.get(group, {})} for group, values in tree.items()}
    return resolve(validate(tree), None)


def row(name: str, right: str, wrong: str) -> dict[str, Any]:
    """A pair in the words of the embedded model; in it all other words are one unknown token."""
    question = f"{name} has three apples and gets four more . how many ?"
    sides = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for answer in (right, wrong)
    ]
    return {"chosen": sides[0], "rejected": sides[1]}


def fault(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        read_inputs(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)
