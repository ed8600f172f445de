"""Adapters: low-rank matrices beside the linear layers of a model, through peft, and what is saved of them.

Owns `model.lora` and what `model.quantization` asks for; the files of an adapter to start from are read by
`rcpo.models.adapter_files`. Does not own training: after `add_adapters` the new
matrices are the only trainable parameters, and the rest of rcpo asks `requires_grad` alone. The reference of
an adapter run is the model as it stands before the new adapter is added; the new one starts with B = 0, so
the untrained policy is that model exactly. The model stays a transformers class, with peft's layers inside.

A layer computes  W x + sum over adapters of scaling * B (A x),  scaling = alpha / rank.
peft and bitsandbytes are imported where they are asked for: they take seconds.
"""

import contextlib
import copy
import dataclasses
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rcpo.common.errors import UserError
from rcpo.config.schema import LoraConfig, ModelConfig
from rcpo.models.adapter_files import PREFIX, WEIGHTS_FILE, adapter_folder, read_adapter_config
from rcpo.models.logit_transform import body_of
from rcpo.models.targets import adapted_by, target_names

logger = logging.getLogger(__name__)

NEW = "default"
"""The adapter that trains; peft's own name for the one adapter of a file."""
BELOW = "below"
"""The frozen adapter that `model.lora.adapter` names."""


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What `add_adapters` put into a model."""

    lora: LoraConfig
    below: dict[str, tuple[Tensor, Tensor]]
    """A and scaling * B of the adapter below, by module; kept only where an adapter is to be saved."""


class Exported(NamedTuple):
    """One tensor of the model that is saved."""

    name: str
    parameters: list[nn.Parameter]
    """What must be whole (gathered, at ZeRO 3) while `read` runs."""
    read: Callable[[], Tensor]


def adapters_of(model: nn.Module) -> Adapters | None:
    """What was added to `model`, None where nothing was."""
    found: Adapters | None = getattr(model, "rcpo_adapters", None)
    return found


def check_adapters(config: ModelConfig) -> None:
    """Raise UserError where `model.lora` or `model.quantization` cannot work here; loads no model."""
    if config.lora.rank is not None and importlib.util.find_spec("peft") is None:
        raise UserError(f"model.lora.rank={config.lora.rank}: needs the peft package; pip install peft")
    if config.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization={config.quantization}: needs the bitsandbytes package; pip install "
            "'rcpo[quantization]'"
        )
    if config.lora.adapter is not None:
        read_adapter_config(config.lora.adapter, config.lora.adapter_revision)


def quantization_options(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is given for `model.quantization`: nf4, quantized twice, on this rank's device.

    Run on bitsandbytes' CPU backend, never on a GPU so far. The output head stays as it is (transformers
    leaves it out), which rcpo's log-prob head relies on.
    """
    if config.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def hold_layout(model: nn.Module) -> None:
    """Let 4-bit weights on a CPU keep one layout: bitsandbytes would lay them out anew for evaluation, where
    other kernels round otherwise than those of training."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010, of modules torch knows no bool


def add_adapters(model: PreTrainedModel, config: ModelConfig, place: str) -> None:
    """Put the adapters of `config.lora` into `model`, in place, and freeze everything but the new one.

    `place` is where the base model was loaded from. At ZeRO 3 the base is sharded already; the new matrices
    are ordinary tensors until DeepSpeed's `initialize` shards them too. A's start depends on the run's seed
    alone, so it is the same on every rank, at every stage. Raises UserError for targets that the model lacks
    and for an adapter that does not fit it. Collective at ZeRO 3.
    """
    lora = config.lora
    if lora.rank is None:
        return
    import peft

    targets = target_names(model, lora, config.vision == "lora")
    expected = adapted_by(model, targets)
    below: dict[str, tuple[Tensor, Tensor]] = {}
    if lora.adapter is not None:
        _load_below(model, lora, config.path, place)
        if lora.save == "adapter":
            below = {name: _matrices(layer, BELOW) for name, layer in lora_layers(model)}
        if lora.on_adapter == "merge":
            refuse_shared(model, "type model.lora.on_adapter=stack")
            _merge_below(model)
    new = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        base_model_name_or_path=str(Path(place).absolute()) if Path(place).is_dir() else place,
    )
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed())
        _inject_new(new, model, expected)
    if lora.save == "merged":
        refuse_shared(model, "type model.lora.save=adapter")
    for _, layer in lora_layers(model):
        layer.set_adapter([BELOW, NEW])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{NEW}." in name and "lora_" in name)
    model.rcpo_adapters = Adapters(lora, below)


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(module name, peft's layer) of every adapted layer."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@contextlib.contextmanager
def new_adapter_off(model: nn.Module) -> Iterator[None]:
    """While open, the new adapter adds 0 B (A x), exactly nothing: the model is its own reference. Its layers
    run all the same, since ZeRO 3 expects them where they were."""
    layers = [layer for _, layer in lora_layers(model)]
    scalings = [layer.scaling.get(NEW) for layer in layers]
    try:
        for layer, scaling in zip(layers, scalings, strict=True):
            if scaling is not None:
                layer.scaling[NEW] = 0.0
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            if scaling is not None:
                layer.scaling[NEW] = scaling


def last_block_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The trainable adapter parameters of the last transformer block, for calibration scope `lora_last`.

    Raises UserError when there are none.
    """
    num_blocks = model.config.get_text_config().num_hidden_layers
    blocks = [
        module
        for module in body_of(model).modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks
    ]
    found = [
        parameter
        for name, parameter in (blocks[0][-1].named_parameters() if blocks else ())
        if parameter.requires_grad and "lora_" in name
    ]
    if not found:
        raise UserError(
            "calibration.scope=lora_last: the last transformer block has no trainable adapter; "
            "type model.lora.rank=16 with model.lora.targets=all-linear, or calibration.scope=head"
        )
    return found


def exported_tensors(model: nn.Module) -> Iterator[Exported]:
    """The tensors of the model that is saved: its own parameters (tied ones once), or for an adapter run the
    merged ones, W + sum of scaling * B A rounded once to W's dtype, or the new adapter's alone."""
    added = adapters_of(model)
    layers: dict[str, Any] = dict(lora_layers(model)) if added is not None else {}
    for name, parameter in model.named_parameters():
        if added is not None and added.lora.save == "adapter":
            if parameter.requires_grad:
                yield _plain_tensor(PREFIX + name.replace(f".{NEW}.", "."), parameter)
        elif "lora_" not in name or added is None:
            module, _, kind = name.rpartition(".base_layer.")
            if module in layers and kind == "weight":
                yield _merged_tensor(f"{module}.weight", layers[module])
            else:
                yield _plain_tensor(name.replace(".base_layer.", "."), parameter)


def _plain_tensor(name: str, parameter: nn.Parameter) -> Exported:
    return Exported(name, [parameter], parameter.detach)


def _merged_tensor(name: str, layer: Any) -> Exported:
    return Exported(name, [layer.get_base_layer().weight, *_low_rank(layer)], lambda: _merged_weight(layer))


def _low_rank(layer: Any) -> list[nn.Parameter]:
    return [module.weight for side in (layer.lora_A, layer.lora_B) for module in side.values()]


def _merged_weight(layer: Any) -> Tensor:
    weight = layer.get_base_layer().weight.detach()
    merged = weight.float()
    for name in layer.lora_A:
        a, scaled_b = _matrices(layer, name)
        merged = merged + scaled_b.float() @ a.float()
    return merged.to(weight.dtype)


def _matrices(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A and scaling * B of one adapter of a layer: their product is what it adds to W."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return a.detach().float(), layer.scaling[adapter] * b.detach().float()


def saves_adapter(model: nn.Module) -> bool:
    """Whether a model folder of this run holds an adapter, to be loaded over its base model."""
    added = adapters_of(model)
    return added is not None and added.lora.save == "adapter"


def save_adapter(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write peft's two files. `weights` are those of `exported_tensors`.

    With an adapter below, both are written as one of the summed rank, [A1; A2] and [s1 B1, s2 B2]: the base
    model and this folder are the whole policy, and the adapter below need not be kept.
    """
    added = adapters_of(model)
    assert added is not None
    weights = {name: tensor for name, tensor in weights.items() if name.startswith(PREFIX)}  # no buffers
    config = copy.deepcopy(model.peft_config[NEW])
    config.inference_mode = True
    if added.below:
        weights = _combined(added.below, weights, config.lora_alpha / config.r)
        ranks = {
            name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): tensor.shape[0]
            for name, tensor in weights.items()
            if name.endswith(".lora_A.weight")
        }
        config.r = config.lora_alpha = max(ranks.values())
        config.target_modules = set(ranks)
        # peft reads the keys as regular expressions for the end of a name.
        others = {name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != config.r}
        config.rank_pattern, config.alpha_pattern = others, dict(others)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(whole, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _combined(
    below: dict[str, tuple[Tensor, Tensor]], weights: dict[str, Tensor], scaling: float
) -> dict[str, Tensor]:
    """One adapter of scaling 1 that adds what `below` and the new one add together."""
    new = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in weights}
    combined = {}
    for module in sorted(new | set(below)):
        parts = [below[module]] if module in below else []
        if module in new:
            a, b = (weights[f"{PREFIX}{module}.lora_{side}.weight"].float() for side in "AB")
            parts.append((a, scaling * b))
        combined[f"{PREFIX}{module}.lora_A.weight"] = torch.cat([a.cpu() for a, _ in parts], dim=0)
        combined[f"{PREFIX}{module}.lora_B.weight"] = torch.cat([b.cpu() for _, b in parts], dim=1)
    return combined


def _load_below(model: PreTrainedModel, lora: LoraConfig, model_path: str, place: str) -> None:
    """Inject the adapter that `lora` names, frozen and without dropout. Raises UserError where it does not
    fit."""
    import peft

    path = str(lora.adapter)
    trained_on = read_adapter_config(path, lora.adapter_revision).get("base_model_name_or_path")
    if trained_on not in (model_path, place, str(Path(place).absolute())):
        logger.warning(
            "model.lora.adapter=%s was trained on %s, it is put on model.path=%s",
            path,
            trained_on,
            model_path,
        )
    folder = adapter_folder(path, lora.adapter_revision)
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.lora_dropout, config.inference_mode = 0.0, True
    try:
        _inject(config, model, BELOW)
    except ValueError as error:
        raise UserError(f"model.lora.adapter={path}: {str(error).splitlines()[0][:300]}") from None
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    slots = {
        name.replace(f".{BELOW}.", "."): parameter
        for name, parameter in model.named_parameters()
        if f".{BELOW}." in name
    }
    for name in sorted(slots.keys() | tensors.keys()):
        shapes = [None if name not in side else tuple(side[name].shape) for side in (tensors, slots)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"model.lora.adapter={path}: {name} is {shapes[0] or 'missing'} in it and "
                f"{shapes[1] or 'missing'} in {type(model).__name__}; give an adapter of this model"
            )
    for _, layer in lora_layers(model):
        if not isinstance(layer.get_base_layer(), nn.Linear):
            raise UserError(f"model.lora.adapter={path}: adapts a layer that is not linear")
    with torch.no_grad():
        for name, parameter in slots.items():
            parameter.copy_(tensors[name])


def _merge_below(model: PreTrainedModel) -> None:
    """Add the loaded adapter to its base weights and take peft's layers out again. Collective at ZeRO 3."""
    for name, layer in lora_layers(model):
        base = layer.get_base_layer()
        with gathered_to_change([base.weight]), torch.no_grad():
            base.weight.copy_(_merged_weight(layer))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    del model.peft_config


def gathered_to_change(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """While open, sharded parameters are whole; what rank 0 wrote into them is sharded again at the end."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    context: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        parameters, modifier_rank=0
    )
    return context


def _inject_new(config: Any, model: PreTrainedModel, expected: set[str]) -> None:
    """Inject the adapter that trains. Raises UserError where peft refuses a layer, or takes others."""
    try:
        _inject(config, model, NEW)
    except ValueError as error:
        raise UserError(
            f"model.lora.targets: peft refuses them: {str(error).splitlines()[0][:300]}"
        ) from None
    found = {name for name, layer in lora_layers(model) if NEW in layer.lora_A}
    if found != expected:
        name = min(found ^ expected)
        raise UserError(
            f"model.lora.targets: peft adapts other layers of {type(model).__name__} than they name, {name} "
            f"for one; type model.lora.targets=[NAME,...] without it"
        )


def refuse_shared(model: PreTrainedModel, advice: str) -> None:
    """Raise UserError where two adapted layers have one weight: no weight is the sum with both adapters."""
    first: dict[int, str] = {}
    for name, layer in lora_layers(model):
        other = first.setdefault(id(layer.get_base_layer().weight), name)
        if other != name:
            raise UserError(
                f"model.lora.targets: {other} and {name} of {type(model).__name__} have one weight and an "
                f"adapter each, which cannot be merged into it; {advice}"
            )


def _inject(config: Any, model: PreTrainedModel, name: str) -> None:
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        peft.inject_adapter_in_model(config, model, adapter_name=name)
