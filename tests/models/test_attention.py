"""Attention kernels: sdpa under a name of ours is sdpa, to the bit, and leaves no trace in saved files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from helpers.tiny_models import SMALL, make_llama, make_neox, make_pairs
from rcpo.data.batch import PairBatch, collate
from rcpo.data.joint import collate_joint
from rcpo.models.attention import UNREAD_SDPA, leave_masks_unread
from rcpo.models.policy import Policy


def make_windowed() -> PreTrainedModel:
    """Attends to the last three tokens."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=3, attn_implementation="sdpa"))


def by_sdpa(make: Callable[[], PreTrainedModel], unread: bool) -> Policy:
    model = make()
    model.set_attn_implementation("sdpa")
    if unread:
        leave_masks_unread(model)
        assert model.config._attn_implementation == UNREAD_SDPA
    return Policy(model)


PADDED = collate(make_pairs(3), 0)
PACKED = collate_joint(make_pairs(3), 0, share_prefix=True, packing=True)


@pytest.mark.parametrize(
    ("make", "batch"),
    [(make_llama, PADDED), (make_neox, PADDED), (make_windowed, PADDED), (make_llama, PACKED)],
    ids=["llama", "neox", "windows", "packed"],
)
def test_sdpa_under_our_name_is_sdpa_to_the_bit(
    make: Callable[[], PreTrainedModel], batch: PairBatch
) -> None:
    """z and every gradient."""
    made = []
    for unread in (False, True):
        policy = by_sdpa(make, unread)
        z = policy(batch)
        z.square().mean().backward()
        made.append([z.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    assert len(made[0]) == len(made[1]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_a_model_whose_code_asks_for_the_name_stays_as_it_is() -> None:
    """Falcon takes another path where the name is not sdpa, one without a causal mask."""
    small = {key: value for key, value in SMALL.items() if key != "head_dim"}
    model = FalconForCausalLM(FalconConfig(**small, attn_implementation="sdpa"))
    leave_masks_unread(model)
    assert model.config._attn_implementation == "sdpa"


def test_eager_stays_eager() -> None:
    model = make_llama()
    leave_masks_unread(model)
    assert model.config._attn_implementation == "eager"


def test_a_saved_model_knows_nothing_of_the_name(tmp_path: Path) -> None:
    by_sdpa(make_llama, unread=True).model.save_pretrained(tmp_path)
    assert UNREAD_SDPA not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
