"""What a GPU computes, against fp64 and against the CPU. Each tolerance is what is expected of a device that
computes as it says, with room for the order of sums."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from helpers.device_runs import DEVICE
from helpers.tiny_models import MODELS, make_batch, make_pairs
from rcpo.data.batch import collate
from rcpo.data.joint import collate_joint
from rcpo.method.scores import matmul_fp32
from rcpo.models.logprobs import TokenLogProbHead
from rcpo.models.policy import Policy

pytestmark = pytest.mark.gpu
NATS_A_TOKEN = 0.06
"""bf16's noise in a sum of log-probs grows with the square root of its tokens."""


def z_of(model: PreTrainedModel, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    batch = collate(make_pairs(16, seed=3), 0)
    with torch.no_grad():
        z: torch.Tensor = Policy(model.to(device, dtype)).eval()(batch.to(torch.device(device)))
    return z.float().cpu()


@pytest.mark.parametrize("product", [torch.matmul, matmul_fp32], ids=["torch", "scores"])
def test_fp32_products_are_fp32(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Against fp64 to 1e-5 of the largest number; TF32 would be off by 3e-4."""
    left, right = torch.randn(384, 1024), torch.randn(1024, 640)
    expected = left.double() @ right.double()
    got = product(left.to(DEVICE), right.to(DEVICE)).double().cpu()
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "of_values", "of_gradients"), [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 5e-3, 2e-2)]
)
def test_the_head_is_a_log_softmax(dtype: torch.dtype, of_values: float, of_gradients: float) -> None:
    """Log-probs and gradients over a vocabulary of 32,003, more than one chunk of it, against fp64 of the
    same rounded numbers: absolute, and relative to the largest."""
    batch = make_batch(12, seed=3)
    hidden = (torch.randn(*batch.input_ids.shape, 64) / 8).to(dtype)
    projection = nn.Linear(64, 32003, bias=False).to(dtype)
    wide, exact = hidden.double().requires_grad_(), nn.Linear(64, 32003, bias=False).double()
    exact.load_state_dict({"weight": projection.weight.double()})
    expected = exact(wide).flatten(0, 1)[batch.token_positions].log_softmax(-1)
    expected = expected.gather(1, batch.targets[:, None]).squeeze(1)
    expected.sum().backward()
    moved = hidden.to(DEVICE).requires_grad_()
    got = TokenLogProbHead(projection.to(DEVICE))(moved, batch.to(torch.device(DEVICE)))
    got.sum().backward()
    assert float((got.detach().double().cpu() - expected).abs().max()) < of_values
    for ours, theirs in ((moved.grad, wide.grad), (projection.weight.grad, exact.weight.grad)):
        assert ours is not None
        assert theirs is not None
        off = (ours.double().cpu() - theirs).abs().max() / theirs.abs().max()
        assert float(off) < of_gradients


@pytest.mark.parametrize("name", MODELS)
def test_fp32_log_probs_are_the_cpu_s(name: str) -> None:
    """z of 16 pairs to 1e-3 nats."""
    torch.testing.assert_close(z_of(MODELS[name](), DEVICE), z_of(MODELS[name](), "cpu"), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_log_probs_are_near(name: str) -> None:
    """z to .06 sqrt(tokens) nats, in the mean over responses; at most 4 times that for one."""
    batch = collate(make_pairs(16, seed=3), 0)
    off = (z_of(MODELS[name](), DEVICE, torch.bfloat16) - z_of(MODELS[name](), "cpu")).abs()
    units = off / batch.lengths.float().sqrt()
    assert float(units.mean()) < NATS_A_TOKEN
    assert float(units.max()) < 4 * NATS_A_TOKEN


@pytest.mark.parametrize("layout", [(True, False), (False, True), (True, True)], ids=str)
def test_joined_rows_are_the_padded_ones(layout: tuple[bool, bool]) -> None:
    """z and the gradient of its sum, of pairs on fewer rows, to 1e-4."""
    pairs, model = make_pairs(6, seed=3), MODELS["llama"]()
    model.set_attn_implementation("sdpa")
    policy = Policy(model.to(DEVICE))
    made = []
    for batch in (collate(pairs, 0), collate_joint(pairs, 0, *layout)):
        model.zero_grad()
        z = policy(batch.to(torch.device(DEVICE)))
        z.sum().backward()
        made.append((z.detach(), [weight.grad.clone() for weight in model.parameters()]))
    (z, gradients), (other_z, other_gradients) = made
    torch.testing.assert_close(other_z, z, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(other_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
