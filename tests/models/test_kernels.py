"""Kernels of attention by name: torch's varlen and FlexAttention see what sdpa sees, and what cannot run here
is a line.

torch's varlen kernel runs on GPUs alone, so a plain loop takes its place: what is tested is how it is called.
FlexAttention goes forward on a CPU, and backward on GPUs alone.
"""

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

import rcpo.models.attention
from helpers.inputs import config_of
from helpers.tiny_models import SMALL, make_llama, make_neox, make_pairs
from rcpo.common.errors import UserError
from rcpo.data.batch import PairBatch, collate
from rcpo.data.joint import collate_joint
from rcpo.models.attention import check_attention, refuse_joint_layout, transformers_name
from rcpo.models.policy import Policy

PAIRS = make_pairs(3, seed=4)
PADDED = collate(PAIRS, 0)
LAYOUTS = {
    (share, pack): collate_joint(PAIRS, 0, share, pack) for share, pack in ((0, 1), (1, 0), (1, 1))
}  # fmt: skip


def make_windowed() -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=3, attn_implementation="sdpa"))


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _: Tensor, longest: int, __: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """By definition, sequence by sequence: (N, A, D) from query (N, A, D) and fewer heads of the others."""
    assert window_size[1] == 0
    assert starts.dtype == torch.int32
    made = []
    bounds = starts.tolist()
    assert longest == max(stop - start for start, stop in itertools.pairwise(bounds))
    for start, stop in itertools.pairwise(bounds):
        q, k, v = (each[start:stop].transpose(0, 1) for each in (query, key, value))
        assert (q.shape[0] != k.shape[0]) == enable_gqa
        k, v = (each.repeat_interleave(q.shape[0] // k.shape[0], 0) for each in (k, v))
        far = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (far >= 0) & ((far <= window_size[0]) | (window_size[0] == -1))
        weights = (scale * q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf).softmax(-1)
        made.append((weights @ v).transpose(0, 1))
    return torch.cat(made)


def policy_with(make: Callable[[], PreTrainedModel], attention: str) -> Policy:
    model = make()
    model.set_attn_implementation(transformers_name(attention))
    return Policy(model)


@pytest.mark.parametrize("make", [make_llama, make_neox, make_windowed], ids=["llama", "neox", "windows"])
@pytest.mark.parametrize("packing", [False, True])
def test_varlen_is_sdpa(
    packing: bool, make: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """z and every gradient to 1e-5 of their norms, on padded rows and on one packed row; with fewer key
    heads, and with windows where rows are padded."""
    if packing and make is make_windowed:
        with pytest.raises(UserError, match="it attends within windows"):
            refuse_joint_layout(policy_with(make, "varlen").model, share_prefix=False)
        return
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    batch, made = LAYOUTS[0, 1] if packing else PADDED, []
    for attention in ("sdpa", "varlen"):
        policy = policy_with(make, attention)
        if packing:
            refuse_joint_layout(policy.model, share_prefix=False)
        z = policy(batch)
        z.square().mean().backward()
        made.append([z.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    for one, other in zip(*made, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


@torch.no_grad()
@pytest.mark.parametrize("make", [make_llama, make_neox], ids=["llama", "neox"])
@pytest.mark.parametrize("batch", [PADDED, *LAYOUTS.values()], ids=["padded", "packed", "shared", "both"])
def test_flex_attention_sees_what_sdpa_sees(batch: PairBatch, make: Callable[[], PreTrainedModel]) -> None:
    """z to 1e-5, in every layout."""
    policy = policy_with(make, "flex_attention")
    refuse_joint_layout(policy.model, share_prefix=True)
    torch.testing.assert_close(policy(batch), policy_with(make, "sdpa")(batch), atol=1e-5, rtol=1e-5)


def test_where_sequences_begin_by_hand() -> None:
    """Of the packed row: chosen and rejected of each pair in turn. Of shared prefixes there are none."""
    lengths = [side.num_tokens for pair in PAIRS for side in (pair.chosen, pair.rejected)]
    segments = LAYOUTS[0, 1].segments
    assert segments is not None
    assert segments.starts is not None
    assert segments.starts.tolist() == [sum(lengths[:number]) for number in range(7)]
    assert segments.longest == max(lengths)
    assert LAYOUTS[1, 1].segments is not None
    assert LAYOUTS[1, 1].segments.starts is None


@pytest.mark.parametrize(
    ("attention", "accepts", "refuses"),
    [("varlen", False, "varlen takes no mask"), ("flex_attention", True, None),
     ("kernels-community/flash-attn2", False, "kernels-community/flash-attn2 takes no mask")],
)  # fmt: skip
def test_which_layouts_a_kernel_takes(attention: str, accepts: bool, refuses: str | None) -> None:
    model = make_llama()
    model.config._attn_implementation = transformers_name(attention)
    refuse_joint_layout(model, share_prefix=False)
    if accepts:
        refuse_joint_layout(model, share_prefix=True)
        return
    with pytest.raises(UserError, match=rf"{refuses}; type model\.attention=sdpa, or flex_attention on GPUs"):
        refuse_joint_layout(model, share_prefix=True)


def config_with(attention: str, dtype: str, device: str) -> Any:
    config = config_of(model={"attention": attention, "dtype": dtype})
    object.__setattr__(config.train, "device", device)
    return config


LINES = [
    ("varlen", "bfloat16", "cpu", "model.attention=varlen: runs on GPUs alone; type model.attention=sdpa"),
    ("varlen", "float32", "cuda",
     "model.attention=varlen: takes no fp32; type model.dtype=bfloat16, or type model.attention=sdpa"),
    ("kernels-community/flash-attn2", "bfloat16", "cuda",
     "model.attention=kernels-community/flash-attn2: is fetched from the hub by the kernels package; pip "
     "install kernels, or type model.attention=sdpa"),
]  # fmt: skip


@pytest.mark.parametrize(("attention", "dtype", "device", "line"), LINES)
def test_what_cannot_run_is_one_line(
    attention: str, dtype: str, device: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        rcpo.models.attention.importlib.util, "find_spec",
        lambda name: None if name == "kernels" else find(name),
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        check_attention(config_with(attention, dtype, device))
    assert str(caught.value) == line
    check_attention(config_with("sdpa", dtype, device))
    check_attention(config_with("flex_attention", dtype, "cuda"))


def test_what_a_kernel_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows in FlexAttention, before a mask without them could be used."""
    with pytest.raises(UserError) as caught:
        policy_with(make_windowed, "flex_attention")(PADDED)
    assert str(caught.value) == (
        "model.attention=flex_attention: MistralAttention attends with windows, which this kernel does not "
        "take; type model.attention=eager"
    )


@pytest.mark.parametrize("packing", [False, True])
def test_torchs_varlen_takes_what_it_is_given(packing: bool) -> None:
    """On the meta device, which has its shapes: forward and back."""
    with torch.device("meta"):
        policy = policy_with(lambda: make_llama().bfloat16(), "varlen")
    z = policy((LAYOUTS[0, 1] if packing else PADDED).to(torch.device("meta")))
    z.sum().backward()
    assert z.shape == (6,)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in policy.parameters())
