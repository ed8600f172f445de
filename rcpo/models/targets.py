"""Which linear layers of a model an adapter goes beside: what `model.lora.targets` names, and what it may
not.

Owns the choice and its reasons. Does not put anything into a model: `rcpo.models.adapters` does, through
peft, and calls this before.
"""

import functools
import inspect
import logging
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rcpo.common.errors import UserError
from rcpo.config.schema import LoraConfig
from rcpo.models.logit_transform import body_of

logger = logging.getLogger(__name__)


def target_names(model: PreTrainedModel, lora: LoraConfig, sees: bool = False) -> list[str]:
    """The names, or ends of names, that peft is given: they match linear layers and nothing else.

    all-linear: all but the output projection and those that cannot have an adapter, which are told. Layers
    that text does not go through, such as those of a vision tower, are left out where a given name matches
    them too; with `sees` they are taken like all others. Raises UserError where a given name is no linear
    layer, the output projection, or cannot have one, and where `sees` asks for layers that are not named.
    """
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    seeing = _beside_text(model, set(linear) - {name for name, module in linear.items() if module is head})
    beside = {} if sees else seeing
    inner = {name for name, module in linear.items() if module is not head and name not in beside}
    to_experts = {child for child in {_last(name) for name in inner} if _moves_to_experts(model, child)}
    reasons = {name: why for name in inner if (why := _why_not(model, name, to_experts)) is not None}
    fit = inner - set(reasons)
    short = _shortest_ends(model, fit)
    kind = type(model).__name__
    if lora.targets == "all-linear":
        if not short:
            raise UserError(f"model.lora.targets=all-linear: {kind} has no linear layers")
        told = {f"{_last(name)} ({why})" for name, why in reasons.items()}
        told |= {f"{part} (text does not go through it)" for part in beside.values()}
        if told:
            logger.warning("model.lora.targets=all-linear: leaves out %s", ", ".join(sorted(told)))
        return short
    wanted = set[str]()
    for target in lora.targets:
        matching = {name for name in linear if _ends(name, target)} - set(beside)
        wanted |= matching
        if not matching:
            raise UserError(
                f"model.lora.targets: {target} is no linear layer of {kind}; it has {', '.join(short)}"
            )
        for name in sorted(matching - fit):
            if name not in reasons:
                raise UserError(
                    f"model.lora.targets: {target} is the output projection, which stays frozen in an "
                    "adapter run; leave it out"
                )
            raise UserError(
                f"model.lora.targets: {target} of {kind} cannot have an adapter: {reasons[name]}; "
                f"choose from {', '.join(short)}"
            )
    if sees and not wanted & set(seeing):
        raise UserError(
            "model.vision=lora: model.lora.targets names no layer of tower or projector; choose some of "
            f"{', '.join(sorted({_last(name) for name in fit & set(seeing)}))} too, or type "
            "model.vision=frozen"
        )
    is_mixed = any(_ends(name, target) for name in beside for target in lora.targets)
    return _shortest_ends(model, wanted) if is_mixed else list(lora.targets)


def _beside_text(model: PreTrainedModel, names: set[str]) -> dict[str, str]:
    """Those of `names` that text does not go through, with the part of the model that they belong to: of
    Gemma 3, whose text goes through model.language_model, model.vision_tower."""
    body = body_of(model)
    path = next(name for name, module in model.named_modules() if module is body).split(".")
    found = {}
    for name in names:
        parts = name.split(".")
        if parts[: len(path)] != path:
            shared = next(place for place, part in enumerate(path) if parts[place : place + 1] != [part])
            found[name] = ".".join(parts[: shared + 1])
    return found


def adapted_by(model: PreTrainedModel, targets: list[str]) -> set[str]:
    """The layers that `targets` match."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name for name in names if any(_ends(name, target) for target in targets)}


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _shortest_ends(model: nn.Module, fit: set[str]) -> list[str]:
    """Ends of the names in `fit`, each of as few parts as match layers of `fit` alone: a linear layer may be
    called 0, and a block as well."""
    matches_fit: dict[str, bool] = {}
    ends: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        parts = name.split(".")
        ends[name] = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        for end in ends[name]:
            matches_fit[end] = matches_fit.get(end, True) and name in fit
    return sorted({next(end for end in ends[name] if matches_fit[end]) for name in fit})


def _why_not(model: PreTrainedModel, name: str, to_experts: set[str]) -> str | None:
    """Why this linear layer cannot have an adapter; None where it can."""
    parent, _, child = name.rpartition(".")
    owner: Any = type(model.get_submodule(parent))
    if not _is_plain(model.get_submodule(name)):
        return "it gives more than a product"
    if not child.isdecimal() and _reads_weight(owner, child):
        return f"{owner.__name__} reads its weight without calling it"
    if child in to_experts:
        return "peft puts it on the fused experts, which are not merged"
    return None


def _is_plain(layer: nn.Module) -> bool:
    """Whether it computes W x + b, also where its class has a forward method of its own, as Falcon's has; a
    router that is a linear layer too does not."""
    forward = type(layer).forward
    if forward is nn.Linear.forward or type(layer).__module__.startswith("bitsandbytes"):
        return True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        stand_in, numbers = nn.Linear(3, 2, device="cpu"), torch.ones(1, 3, device="cpu")
        try:
            return torch.allclose(forward(stand_in, numbers), stand_in(numbers))
        except Exception:  # whatever it wants of a class that this is not
            return False


@functools.cache
def _reads_weight(owner: Any, child: str) -> bool:
    """Whether the class hands `self.CHILD.weight` to a kernel of its own, which goes around an adapter there;
    asking for its dtype, device or shape does no harm. Read off the source: the kernels need a GPU."""
    try:
        text = inspect.getsource(owner)
    except (OSError, TypeError):
        return False
    harmless = r"dtype|device|shape|size\(|is_cuda|numel\("
    return re.search(rf"\.{re.escape(child)}\.weight\b(?!\.(?:{harmless}))", text) is not None


def _moves_to_experts(model: PreTrainedModel, child: str) -> bool:
    """Whether peft takes this name for the experts of a mixture: before transformers 5 they were linear
    layers, with the names that dense layers of the same model still have."""
    import peft

    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_config_for_transformers,
            get_model_conversion_mapping,
        )
    except ImportError:  # where it does not convert, `rcpo.models.adapters` finds what it adapts instead
        return False
    config = peft.LoraConfig(target_modules=[child])
    try:
        convert_peft_config_for_transformers(
            config, model=model, conversions=get_model_conversion_mapping(model)
        )
    except ValueError:  # one of two names that are fused
        return True
    return child not in (config.target_modules or ())
