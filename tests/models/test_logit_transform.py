"""Architectures whose logits are not head(hidden): what rcpo reads off them, z, gradients and scores."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    NanoChatConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    set_seed,
)

from helpers.tiny_models import HIDDEN, SMALL, VOCABULARY, make_batch, make_llama
from rcpo.common.errors import UserError
from rcpo.method.scores import HeadScores
from rcpo.models.logit_transform import NOTHING, LogitTransform, logit_transform
from rcpo.models.logprobs import TokenLogProbHead, sum_per_side
from rcpo.models.policy import Policy

FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any], LogitTransform]] = {
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 2.0}, LogitTransform(1.0, 2.0)),
    "gemma4": (
        Gemma4TextConfig,
        {"final_logit_softcapping": 3.0, "vocab_size_per_layer_input": VOCABULARY},
        LogitTransform(1.0, 3.0),
    ),
    "recurrent_gemma": (
        RecurrentGemmaConfig,
        {"logits_soft_cap": 2.0, "lru_width": 32, "attention_window_size": 64},
        LogitTransform(1.0, 2.0),
    ),
    "nanochat": (NanoChatConfig, {"final_logit_softcapping": 1.5}, LogitTransform(1.0, 1.5)),
    "granite": (GraniteConfig, {"logits_scaling": 8.0}, LogitTransform(0.125)),
    "hyperclovax": (HyperCLOVAXConfig, {"logits_scaling": 0.25}, LogitTransform(0.25)),
    "cohere": (CohereConfig, {"logit_scale": 0.0625}, LogitTransform(0.0625)),
    "minicpm3": (
        MiniCPM3Config,
        {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
        | {"num_key_value_heads": 4, "dim_model_base": 8},  # hidden states divided by 32/8 before the head
        LogitTransform(0.25),
    ),
    "falcon_h1": (
        FalconH1Config,
        {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
        | {"mamba_d_state": 8, "mamba_chunk_size": 8},
        LogitTransform(0.3),
    ),
    "gpt2": (GPT2Config, {}, NOTHING),
    "gemma3": (Gemma3TextConfig, {}, NOTHING),
}


def make(name: str) -> PreTrainedModel:
    kind, own, _ = FAMILIES[name]
    set_seed(0)
    config = kind(**(SMALL | own))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(5)  # logits far enough out for a cap to bend them
    return model.eval()


def own_logps(model: PreTrainedModel, batch: Any) -> Tensor:
    """(N,) by the model's own forward pass."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)
    return logits.float().log_softmax(-1)[batch.token_positions, batch.targets]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_architecture_s_z_and_gradients_are_its_own(name: str) -> None:
    """z to 1e-4, gradients of a weighted sum of z over all parameters to 1e-3 of their norm."""
    model, batch = make(name), make_batch(4)
    policy = Policy(model).eval()
    found = logit_transform(model, model.get_output_embeddings())
    expected = FAMILIES[name][2]
    assert found == pytest.approx(expected) if expected.cap is None else found == expected
    z = policy(batch)
    own = sum_per_side(own_logps(model, batch), batch)
    torch.testing.assert_close(z, own, atol=1e-4, rtol=1e-4)
    plain = TokenLogProbHead(model.get_output_embeddings())
    body = policy.body(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    if expected != NOTHING:  # without the transformation it would be another number
        assert (sum_per_side(plain(body, batch), batch) - own).abs().max() > 0.5
    upstream = torch.randn(len(z))
    parameters = [each for each in model.parameters() if each.requires_grad]
    grads = [torch.autograd.grad((upstream * each).sum(), parameters, allow_unused=True) for each in (z, own)]
    for ours, theirs in zip(*grads, strict=True):
        if theirs is not None and ours is not None:
            assert (ours - theirs).norm() <= 1e-3 * max(theirs.norm(), 1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "transform", [LogitTransform(0.5), LogitTransform(1.0, 2.0), LogitTransform(3.0, 4.0)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_head_and_scores_agree_with_autograd(
    transform: LogitTransform, has_bias: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token log-probs, their gradients, and the two sides' sums of scores: unweighted the gradient of the sum
    of z, weighted of the sum that is trained on."""
    monkeypatch.setattr("rcpo.models.logprobs.CHUNK_ELEMENTS", 16 * VOCABULARY)
    batch = make_batch(9, seed=3)
    projection = nn.Linear(HIDDEN, VOCABULARY, bias=has_bias)
    hidden = torch.randn(*batch.input_ids.shape, HIDDEN, requires_grad=True)
    leaves = [hidden, *projection.parameters()]
    head = TokenLogProbHead(projection, transform)
    head.scores = HeadScores(VOCABULARY, HIDDEN, has_bias, torch.device("cpu"), weighted)
    logits = nn.functional.linear(hidden, projection.weight, projection.bias).flatten(0, 1)
    logits = transform.scale * logits
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    expected = logits.log_softmax(-1)[batch.token_positions, batch.targets]
    logps = head(hidden, batch)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(len(logps))
    ours = torch.autograd.grad(logps, leaves, upstream)
    theirs = torch.autograd.grad(expected, leaves, upstream, retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    sides = head.scores.sides(1.0, 1.0)
    num = batch.num_chosen_tokens
    for side, part in ((sides.chosen, slice(0, num)), (sides.rejected, slice(num, None))):
        factors = upstream[part] if weighted else torch.ones(len(upstream[part]))
        grads = torch.autograd.grad(
            (factors * expected[part]).sum(), list(projection.parameters()), retain_graph=True
        )
        whole = torch.cat([grads[0], *(each[:, None] for each in grads[1:])], dim=1)
        torch.testing.assert_close(side[0], whole, atol=1e-5, rtol=1e-5)


def test_what_is_neither_a_factor_nor_a_cap_is_refused_by_name() -> None:
    class Squared(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0.1 * output.logits**2
            return output

    model = Squared(make_llama().config)
    with pytest.raises(UserError, match=r"Squared makes .* neither a factor nor a soft cap"):
        Policy(model)


def test_looking_leaves_the_model_as_it_was() -> None:
    model = make_llama().train()
    batch = make_batch(2)
    before = own_logps(model, batch)
    logit_transform(model, model.get_output_embeddings())
    assert model.training
    torch.testing.assert_close(own_logps(model, batch), before, atol=0, rtol=0)
