"""Liger's kernels and compiled layers: where they go, what they leave alone, and what is refused."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import rcpo.engine.speedups
from helpers.inputs import config_of
from helpers.tiny_models import make_batch, make_llama, make_neox
from rcpo.common.errors import UserError
from rcpo.config.schema import ModelConfig
from rcpo.engine.speedups import check_speedups, speed_up
from rcpo.models.policy import Policy


def config_with(device: str, **model: Any) -> Any:
    config = config_of(model=model)
    object.__setattr__(config.train, "device", device)
    return config


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("cpu", "model.kernels=liger: runs on GPUs alone; type model.kernels=null"),
        ("cuda", "model.kernels=liger: needs the liger-kernel package; pip install 'rcpo[liger]', or type "
                 "model.kernels=null"),
    ],
)  # fmt: skip
def test_liger_needs_a_gpu_and_its_package(device: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        rcpo.engine.speedups.importlib.util, "find_spec",
        lambda name: None if name == "liger_kernel" else find(name),
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        check_speedups(config_with(device, kernels="liger"))
    assert str(caught.value) == line
    check_speedups(config_with(device, kernels=None))


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        (
            {"model": {"compile": True}, "deepspeed": {"stage": 3}},
            "model.compile=true: cannot compile around stage 3, which gathers weights within every layer; "
            "type deepspeed.stage=2, or model.compile=false",
        ),
        (
            {"model": {"compile": True, "quantization": "4bit", "lora": {"rank": 2, "save": "adapter"}}},
            "model.compile=true: cannot compile model.quantization=4bit; type model.compile=false",
        ),
    ],
)
def test_what_cannot_be_compiled_is_one_line(groups: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(**groups)
    assert str(caught.value) == line


def test_liger_is_asked_for_norms_mlps_and_positions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stand-in for its module: not for its losses, since the head is rcpo's; and not where it has no
    kernels."""
    asked: list[tuple[PreTrainedModel, dict[str, bool]]] = []
    stand_in: Any = ModuleType("liger_kernel.transformers")
    stand_in.monkey_patch = ModuleType("monkey_patch")
    stand_in.monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    stand_in.monkey_patch._apply_liger_kernel_to_instance = lambda model, **words: asked.append(
        (model, words)
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    config, model = ModelConfig(path="m", kernels="liger"), make_llama()
    speed_up(model, config)
    on = {"rms_norm": True, "swiglu": True, "geglu": True, "rope": True}
    assert asked == [(model, on | {"cross_entropy": False, "fused_linear_cross_entropy": False})]
    with pytest.raises(UserError) as caught:
        speed_up(make_neox(), config)
    assert str(caught.value) == (
        "model.kernels=liger: Liger has no kernels for gpt_neox (model.path=m); type model.kernels=null"
    )


@pytest.mark.ci("compiled layers")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [make_llama, make_neox], ids=["llama", "neox"])
def test_compiled_layers_are_the_layers(
    make: Callable[[], PreTrainedModel], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and run without a compiler: z and gradients to 1e-6 of their norms, on rows of two widths; names
    and weights are as before."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    made = []
    for compiles in (False, True):
        model = make()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        names = list(model.state_dict())
        speed_up(model, ModelConfig(path="m", compile=compiles))
        assert list(model.state_dict()) == names
        compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
        assert len(compiled) == (2 if compiles else 0)
        policy = Policy(model).train()
        total = sum(policy(make_batch(3, seed=seed)).square().mean() for seed in (1, 2))
        total.backward()
        made.append([total.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    for one, other in zip(*made, strict=True):
        assert (one - other).norm() <= 1e-6 * one.norm()
