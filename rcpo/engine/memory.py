"""What a rank's memory will hold, from shapes alone, before anything is allocated for training.

Weights, gradients, optimizer, head and calibration follow from the config and from what DeepSpeed allocates;
activations are an estimate (`activation_bytes`). Called by `rcpo.launch.stage`, which chooses the ZeRO stage
by it, and by `rcpo.training.rehearsal`, which then runs the largest micro-batch for certain."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rcpo.config.resolved import ResolvedConfig
from rcpo.engine.optimizer import can_be_fused
from rcpo.method.scores import BUCKET_NUMBERS
from rcpo.models.adapters import last_block_parameters
from rcpo.models.logprobs import head_sizes, logit_bytes
from rcpo.models.sizes import numel

FP32 = 4
BYTES_IN_4_BIT = 0.516
"""Of a number of a quantized layer: 4 bits, 8 for the scale of each 64 and 32 for that of each 256 scales."""
BUCKET = 500_000_000
"""Numbers that DeepSpeed's stages 2 and 3 (in fp32 1 too) put together for one exchange."""
LIVE_NUMBERS = 1_000_000_000
"""Of weights that stage 3 keeps whole at a time, and of masters that it steps at a time."""
USABLE = 0.9
"""Part of a GPU's memory that a budget may fill: the rest is the driver's, NCCL's and lost between blocks."""


def memory_budget(
    config: ResolvedConfig,
    model: PreTrainedModel,
    num_rows: int,
    width: int,
    reference: int = 0,
    stage: int | None = None,
) -> dict[str, int]:
    """Bytes by what they are for, on one rank, for micro-batches of `num_rows` rows (two a pair) of `width`
    tokens, at `stage` or the config's. `model` may be on the meta device.

    With P parameters of b bytes, of which P_t train, N ranks and ZeRO stage s:

    weights      b P; at 3 b P / N and what is whole at a time
    gradients    4 P_t, fp32 whatever the weights; / N at 2 and 3. In bf16 at 1 the largest matrix's cast to
                 fp32 too, or all of the bf16 gradients where `bf16.immediate_grad_update` is off
    optimizer    4 P_t for each of AdamW's two moments (P_t in 8 bits) or SGD's momentum, and 4 P_t of masters
                 at 1 to 3 and in bf16; / N at 1 to 3; with deepspeed.offload=optimizer elsewhere
    exchange     one bucket at 2 and 3, and in fp32 at 1; two at 2 on GPUs, where gradients travel meanwhile
    head         fp32 logits of a chunk and the kept ones; where the head trains, the fp32 product of a chunk
                 and the sum of them
    calibration  2 P_t fp32 / N with scope full and two buckets, 2 V H fp32 and their shares with scope head;
                 metrics.population has as many shares again
    reference    0: its log-probabilities are computed beforehand, two numbers a pair; or what a live model
                 holds
    update       what the update needs beyond activations and head, which are gone by then: AdamW's fp32
                 denominator, where it is not one kernel, and, sharded, the flat gradient
    """
    stage = config.zero_stage if stage is None else stage
    size = 2 if config.model.dtype == "bfloat16" else FP32
    shape = model.config.get_text_config()
    budget = {
        "weights": _weight_bytes(config, model, size, stage),
        "gradients": _gradient_bytes(config, model, size, stage),
        "optimizer": _optimizer_bytes(config, model, size, stage),
        "exchange": _exchange_bytes(config, model, size, stage),
        "activations": activation_bytes(config, shape, num_rows, width, size),
        "head": _head_bytes(config, model, num_rows * width, size),
        "calibration": _calibration_bytes(config, model),
        "reference": reference,
    }
    freed = budget["activations"] + budget["head"]
    return budget | {"update": max(0, update_bytes(config, model, stage) - freed)}


def fitting_stage(
    config: ResolvedConfig, model: PreTrainedModel, num_rows: int, width: int, capacity: int
) -> int:
    """The lowest ZeRO stage from 1 on whose budget fits into `USABLE` of `capacity` bytes a rank; the highest
    one that the config allows, where none does."""
    stages = allowed_stages(config)
    for stage in stages:
        reference = live_reference_bytes(config, model, stage)
        budget = memory_budget(config, model, num_rows, width, reference, stage)
        if sum(budget.values()) <= USABLE * capacity:
            return stage
    return stages[-1]


def allowed_stages(config: ResolvedConfig) -> Sequence[int]:
    """Stages from 1 on that the rules of `rcpo.config.rules` leave."""
    published = config.calibration.name == "published" and config.calibration.scope == "lora_last"
    return (1, 2) if published or config.model.quantization is not None or config.model.compile else (1, 2, 3)


def _weight_bytes(config: ResolvedConfig, model: PreTrainedModel, size: int, stage: int) -> int:
    quantized = set() if config.model.quantization is None else _quantized(model)
    total = sum(
        int(BYTES_IN_4_BIT * numel(parameter)) if id(parameter) in quantized else size * numel(parameter)
        for parameter in model.parameters()
    )
    if stage < 3:
        return total
    return total // config.world_size() + min(total, size * LIVE_NUMBERS)


def _quantized(model: PreTrainedModel) -> set[int]:
    """Of the parameters that 4-bit weights replace: linear layers without the head."""
    head = model.get_output_embeddings()
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    }


def _gradient_bytes(config: ResolvedConfig, model: PreTrainedModel, size: int, stage: int) -> int:
    sizes = [numel(parameter) for parameter in model.parameters() if parameter.requires_grad]
    whole = FP32 * sum(sizes)
    if stage >= 2:
        return whole // config.world_size()
    if size == FP32 or stage == 0:
        return whole
    at_once = config.deepspeed.extra.get("bf16", {}).get("immediate_grad_update", True)
    return whole + (FP32 * max(sizes, default=0) if at_once else size * sum(sizes))


def _optimizer_bytes(config: ResolvedConfig, model: PreTrainedModel, size: int, stage: int) -> int:
    if config.deepspeed.offload == "optimizer":
        return 0
    moments = {"adamw": 2 * FP32, "adamw_8bit": 0 if config.optim.paged else 2}
    of_momentum = FP32 * (config.optim.momentum > 0)
    moments["rmsprop"] = FP32 + of_momentum
    of_number = moments.get(config.optim.name, of_momentum)
    of_number += FP32 * (stage > 0 or size < FP32)
    return _trained(model) * of_number // (config.world_size() if stage >= 1 else 1)


def _exchange_bytes(config: ResolvedConfig, model: PreTrainedModel, size: int, stage: int) -> int:
    num_buckets = int(stage >= 2 or (stage == 1 and size == FP32))
    num_buckets += stage == 2 and config.train.device == "cuda" and config.world_size() > 1
    return FP32 * num_buckets * min(BUCKET, _trained(model))


def update_bytes(config: ResolvedConfig, model: PreTrainedModel, stage: int) -> int:
    """What an update has at a time beyond what stays: AdamW's square root of the second moment, where it is
    not one kernel, and the flat gradient that stages 1 to 3 make."""
    if config.deepspeed.offload == "optimizer":
        return 0
    share = FP32 * _trained(model) // (config.world_size() if stage >= 1 else 1)
    if stage == 3:
        share = min(share, FP32 * LIVE_NUMBERS)
    has_denominator = config.optim.name == "adamw" and not can_be_fused(config)
    return share * (has_denominator + (stage >= 1))


def live_reference_bytes(config: ResolvedConfig, model: PreTrainedModel, stage: int) -> int:
    """Of a frozen model beside the policy; an adapter run has it in itself."""
    if config.reference.name != "live" or (config.model.lora.rank is not None and not config.reference.path):
        return 0
    total = sum(numel(parameter) for name, parameter in model.named_parameters() if "lora_" not in name)
    return (
        total
        * (2 if config.model.dtype == "bfloat16" else FP32)
        // (config.world_size() if stage == 3 else 1)
    )


def _head_bytes(config: ResolvedConfig, model: PreTrainedModel, num_tokens: int, size: int) -> int:
    """A chunk's product and the sum of them are there at once."""
    weight, vocabulary = model.get_output_embeddings().weight, model.config.get_text_config().vocab_size
    products = FP32 * 2 * numel(weight) if weight.requires_grad else 0
    return products + logit_bytes(head_sizes(config.train.device, vocabulary), vocabulary, num_tokens, size)


def activation_bytes(config: ResolvedConfig, shape: Any, num_rows: int, width: int, size: int) -> int:
    """What autograd keeps of a forward pass, about.

    Per token and block: nine hidden vectors and four of the MLP's width in the dtype of the weights, two
    hidden vectors in fp32 for the norms, and with eager attention two matrices of width x width a head. With
    gradient checkpointing one hidden vector a block, and one block whole.
    """
    hidden = _number(shape, "hidden_size")
    heads = _number(shape, "num_attention_heads")  # Mamba and RWKV have none
    inner = _number(shape, "intermediate_size") or 4 * hidden
    block = (9 * hidden + 4 * inner) * size + 2 * hidden * FP32
    if config.model.attention == "eager":
        block += 2 * heads * width * size
    num_blocks = _number(shape, "num_hidden_layers")
    blocks = num_blocks * block
    if config.model.gradient_checkpointing:
        blocks = num_blocks * hidden * size + block
    return num_rows * width * blocks


def _number(shape: Any, name: str) -> int:
    """An entry of a config: the largest, where every block has its own; 0 where the architecture has none."""
    value = getattr(shape, name, None) or 0
    return int(max(value) if isinstance(value, list | tuple) else value)


def _calibration_bytes(config: ResolvedConfig, model: PreTrainedModel) -> int:
    if config.calibration.name not in ("on", "exact", "published") and config.metrics.geometry_every == 0:
        return 0
    num_ranks = config.world_size()
    if config.calibration.scope == "head":
        weight = model.get_output_embeddings().weight
        both = 2 * numel(weight)
        shares = (num_ranks > 1) + config.metrics.population
        product = 0 if weight.requires_grad else numel(weight)  # where it trains, the head has one anyway
        return FP32 * (both + shares * both // num_ranks + product)
    measured = _trained(model)
    if config.calibration.scope == "lora_last":
        measured = sum(numel(parameter) for parameter in last_block_parameters(model))
    buckets = 2 * min(BUCKET_NUMBERS, measured) if num_ranks > 1 else 0
    return FP32 * ((1 + config.metrics.population) * 2 * measured // num_ranks + buckets)


def _trained(model: PreTrainedModel) -> int:
    return sum(numel(parameter) for parameter in model.parameters() if parameter.requires_grad)


def in_words(budget: dict[str, int]) -> str:
    """One line: "weights 0.3 MB, gradients 0.3 MB, ..., together 1.2 GB"."""
    optional = ("exchange", "update")
    parts = [
        f"{name}{' about' if name == 'activations' else ''} {shown(count)}"
        for name, count in budget.items()
        if count or name not in optional
    ]
    return f"{', '.join(parts)}; together {shown(sum(budget.values()))}"


def shown(num_bytes: int) -> str:
    """In MB or GB (10^6 and 10^9 bytes)."""
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:.3g} MB" if num_bytes else "0"
    return f"{num_bytes / 1e9:.3g} GB"
