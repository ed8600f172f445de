"""What only a GPU's kernels do, against what every machine does: attention by name, Liger's layers, compiled
layers. One that the machine lacks is left out, with rcpo's own line.

A rehearsal has FlexAttention's pass forward, and compiled layers without a compiler.
"""

import functools

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from helpers.device_runs import DEVICE, ON_GPU
from helpers.inputs import config_of
from helpers.tiny_models import SMALL, make_pairs
from rcpo.common.errors import UserError
from rcpo.config.schema import ModelConfig
from rcpo.data.batch import PairBatch, collate
from rcpo.data.joint import collate_joint
from rcpo.engine.speedups import check_speedups, speed_up
from rcpo.models.attention import check_attention, refuse_joint_layout, transformers_name
from rcpo.models.policy import Policy

pytestmark = pytest.mark.gpu
SHAPE = SMALL | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.1}
"""Heads as wide as kernels want them."""
PAIRS = make_pairs(6, seed=3)
BATCHES = {
    "padded": collate(PAIRS, 0),
    "packed": collate_joint(PAIRS, 0, False, True),
    "shared": collate_joint(PAIRS, 0, True, False),
    "both": collate_joint(PAIRS, 0, True, True),
}
KERNELS = ("varlen", "flex_attention", "flash_attention_2", "kernels-community/flash-attn2")
NATS_A_TOKEN = 0.06
"""bf16's noise, as in `test_numbers`."""


def made(attention: str, dtype: torch.dtype) -> PreTrainedModel:
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(DEVICE, dtype)
    model.set_attn_implementation(transformers_name(attention))
    return model


def left_out_where_it_cannot_run(**of_model: object) -> None:
    """Skip, and say why in rcpo's words."""
    config = config_of(model=of_model)
    object.__setattr__(config.train, "device", DEVICE)
    try:
        check_attention(config)
        check_speedups(config)
    except UserError as error:
        pytest.skip(str(error))


def back(model: PreTrainedModel, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """z, and the gradient of its sum, one vector; fp32."""
    model.zero_grad()
    z = Policy(model)(batch.to(torch.device(DEVICE)))
    z.sum().backward()
    gradients = [weight.grad.float().flatten() for weight in model.parameters() if weight.grad is not None]
    return z.detach().float(), torch.cat(gradients)


def off(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("attention", KERNELS)
def test_kernels_of_attention_are_sdpa(attention: str, layout: str) -> None:
    """In bf16, on rows of every layout that the kernel takes: z to .06 sqrt(tokens) nats in the mean over
    responses, the gradient to 5 % of its norm. FlexAttention in fp32 too: 1e-3 nats, and 1e-3."""
    if attention != "flex_attention" or ON_GPU:
        left_out_where_it_cannot_run(attention=attention, dtype="bfloat16")
    try:
        refuse_joint_layout(made(attention, torch.bfloat16), "shared" in layout or layout == "both")
    except UserError as error:
        pytest.skip(str(error))
    batch = BATCHES[layout]
    tokens = batch.lengths.float().sqrt().to(DEVICE)
    for dtype in (torch.bfloat16, torch.float32) if attention == "flex_attention" else (torch.bfloat16,):
        if not ON_GPU:  # FlexAttention goes back on GPUs alone
            with torch.no_grad():
                pair = [Policy(made(name, dtype))(batch).float() for name in (attention, "sdpa")]
            apart = (pair[0] - pair[1]).abs()
        else:
            (z, gradient), (expected, expected_gradient) = (
                back(made(name, dtype), batch) for name in (attention, "sdpa")
            )
            apart = (z - expected).abs()
            assert off(gradient, expected_gradient) < (0.05 if dtype == torch.bfloat16 else 1e-3)
        if dtype == torch.bfloat16:
            assert float((apart / tokens).mean()) < NATS_A_TOKEN
        else:
            assert float(apart.max()) < 1e-3


@pytest.mark.parametrize("faster", [{"kernels": "liger"}, {"compile": True}], ids=["liger", "compiled"])
def test_faster_layers_are_the_layers(faster: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32: z to 1e-3 nats and the gradient to 1e-3 of its norm, on rows of two widths."""
    left_out_where_it_cannot_run(**faster)
    if not ON_GPU:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = made("sdpa", torch.float32)
    speed_up(model, ModelConfig(path="m", **faster))  # type: ignore[arg-type]
    for batch in (BATCHES["padded"], collate(PAIRS[:1], 0)):
        z, gradient = back(model, batch)
        expected, expected_gradient = back(made("sdpa", torch.float32), batch)
        torch.testing.assert_close(z, expected, atol=1e-3, rtol=0)
        assert off(gradient, expected_gradient) < 1e-3
