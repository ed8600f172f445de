"""The model that ships, with attention heads of 32 numbers in place of 24: the same function, in a shape that
vLLM's kernels for CPUs take (they have 32, 64, 80, ...)."""

import math
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rcpo.models.load import model_place

WIDTH = 32


def write_wide(folder: Path, place: str | Path | None = None) -> PreTrainedModel:
    """Write the Llama in the folder `place`, by default builtin:tiny, to `folder` with heads of `WIDTH`.

    A head's halves, which rotary positions pair, keep their order with zeros behind each. theta^(32/24) in
    place of theta gives pair i the same frequency, theta^(-2 i / 24). Queries are longer by sqrt(32/24), by
    which a wider head divides more."""
    place = Path(model_place("builtin:tiny") if place is None else place)
    config, old = AutoConfig.from_pretrained(place), AutoModelForCausalLM.from_pretrained(place)
    narrow = config.head_dim
    config.head_dim = WIDTH
    config.rope_parameters["rope_theta"] **= WIDTH / narrow
    new = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {}
    for name, weight in old.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weight = _widened(weight, narrow)
        elif name.endswith("o_proj.weight"):
            weight = _widened(weight.T, narrow).T
        weights[name] = weight * math.sqrt(WIDTH / narrow) if "q_proj" in name else weight
    new.load_state_dict(weights)
    shutil.copytree(place, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    new.save_pretrained(folder)
    return new.eval()


def _widened(weight: Tensor, narrow: int) -> Tensor:
    """(heads * narrow, n) with zeros behind each half of a head: (heads * WIDTH, n)."""
    halves = weight.reshape(-1, narrow // 2, weight.shape[1])
    wide = torch.zeros(len(halves), WIDTH // 2, weight.shape[1])
    wide[:, : narrow // 2] = halves
    return wide.reshape(-1, weight.shape[1])
