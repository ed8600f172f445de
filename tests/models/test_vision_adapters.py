"""Adapters on what sees (model.vision=lora): where they are, and their gradient by plain torch."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from helpers.tiny_vision import make_vision, plain_z, tokenized
from rcpo.common.errors import UserError
from rcpo.config.schema import LoraConfig, ModelConfig
from rcpo.data.batch import collate
from rcpo.models.load import load_model
from rcpo.models.policy import Policy
from rcpo.models.vision import check_vision

ALL = ("idefics3", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = (
    "llava",
    *(pytest.param(name, marks=pytest.mark.ci("families of vision-language models")) for name in ALL),
)


def config_of(folder: Path, vision: str = "lora", **lora: object) -> ModelConfig:
    return ModelConfig(
        path=str(folder / "model"), dtype="float32", vision=vision, lora=LoraConfig(rank=2, **lora)
    )


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp(request.param)
    make_vision(found / "model", request.param)
    return found


def linear_layers(model: PreTrainedModel) -> set[str]:
    head = model.get_output_embeddings()
    return {name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head}


def adapted(model: PreTrainedModel) -> set[str]:
    return {name.partition(".lora_")[0] for name, each in model.named_parameters() if each.requires_grad}


def test_every_linear_layer_but_the_head_has_an_adapter_and_nothing_else_trains(folder: Path) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(folder / "model")
    assert adapted(load_model(config_of(folder))) == linear_layers(plain)
    text = next(name for name, each in plain.named_modules() if each is plain.get_decoder())
    of_text = {name for name in linear_layers(plain) if name.startswith(text + ".")}
    assert adapted(load_model(config_of(folder, "frozen"))) == of_text


def test_z_and_gradient_are_those_of_plain_torch(folder: Path) -> None:
    """With B away from 0: of every A and B, and of nothing else."""
    model = load_model(config_of(folder))
    torch.manual_seed(0)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.normal_(std=0.1)
    pairs = tokenized(folder, 4, (1, 2))
    coefficients = torch.tensor([[-0.3, -0.7, 0.2], [0.6, 0.1, -0.8]])
    expected = torch.stack([torch.stack(plain_z(model, pair)) for pair in pairs], dim=1)
    (coefficients * expected).sum().backward()
    gradient = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    assert set(gradient) == {name for name, each in model.named_parameters() if each.requires_grad}
    assert all(each.abs().max() > 0 for each in gradient.values())
    model.zero_grad()
    z = Policy(model)(collate(pairs, 0)).view(2, -1)
    (coefficients * z).sum().backward()
    assert torch.allclose(z, expected, atol=1e-4)
    for name, each in model.named_parameters():
        assert (each.grad is None) == (name not in gradient), name
        if name in gradient:
            scale = max(1.0, float(gradient[name].abs().max()))
            assert torch.allclose(each.grad, gradient[name], atol=2e-4 * scale), name


def test_named_layers_are_those_of_both(folder: Path) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(folder / "model")
    if not any(name.endswith(".fc1") for name in linear_layers(plain)):
        return
    model = load_model(config_of(folder, targets=["q_proj", "fc1"]))
    found = {name.rpartition(".")[2] for name in adapted(model)}
    assert found == {"q_proj", "fc1"}
    message = "names no layer of tower or projector; choose some of .*fc1.* too, or type model.vision=frozen"
    with pytest.raises(UserError, match=message):
        load_model(config_of(folder, targets=["gate_proj"]))


def test_a_part_does_not_train_whole_beside_an_adapter(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder / "model")
    for vision in ("projector", "train"):
        with pytest.raises(UserError, match=f"vision={vision}: where adapters train, no whole part does"):
            check_vision(config_of(folder, vision), config)
