"""Adapters as other tools write them, and log-probs of a model with and without one."""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.tiny_models import make_batch
from rcpo.config.schema import ModelConfig
from rcpo.models.load import load_model
from rcpo.models.policy import Policy

ATTENTION = {
    "llama": "q_proj",
    "llama-tied": "q_proj",
    "neox": "query_key_value",
    "neox-tied": "query_key_value",
}


def write_sft_adapter(
    folder: Path, place: Path, *, rank: int = 2, dropout: float = 0.3, **entries: Any
) -> Path:
    """An adapter on the attention's input, with B away from 0: rank 2, scaling 5/2, and dropout."""
    torch.manual_seed(7)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=5, lora_dropout=dropout, init_lora_weights=False,
        target_modules=[ATTENTION[folder.name]], **entries,
    )  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model.save_pretrained(place)
    return place


def logprobs(model: PreTrainedModel, *, train: bool = False) -> Tensor:
    with torch.no_grad():
        return Policy(model).train(train)(make_batch(3))


def base_model(folder: Path) -> PreTrainedModel:
    return load_model(ModelConfig(path=str(folder), dtype="float32"))
