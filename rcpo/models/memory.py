"""What a rank's memory will hold, from shapes alone, before anything is allocated for training.

Weights, gradients, optimizer, head and calibration follow from the config; activations are an estimate
(`activation_bytes`). Called by `rcpo.training.rehearsal`, which then runs the largest micro-batch for
certain."""

from typing import Any

from transformers import PreTrainedModel

from rcpo.config.resolved import ResolvedConfig
from rcpo.models.logprobs import head_sizes, logit_bytes

FP32 = 4


def memory_budget(
    config: ResolvedConfig, model: PreTrainedModel, num_rows: int, width: int, reference: int = 0
) -> dict[str, int]:
    """Bytes by what they are for, on one rank, for micro-batches of `num_rows` rows (two a pair) of `width`
    tokens.

    With P parameters of b bytes, of which P_t train, N ranks and ZeRO stage s: weights b P (/N at 3);
    gradients 4 P_t, in fp32 (/N at 2 and 3); optimizer 4 P_t for each of AdamW's two moments or SGD's
    momentum, and 4 P_t for the fp32 weights that are stepped, but at 0 in fp32 (all /N at 1 to 3); head the
    fp32 logits of a chunk and the kept ones; calibration 2 P_t fp32 / N with scope full, 2 V H fp32 with
    scope head. The reference's log-probabilities are computed beforehand, two numbers a pair, or a live
    model holds `reference` bytes.
    """
    num_ranks, stage = config.world_size(), config.deepspeed.stage or 0
    parameters = list(model.parameters())
    size = 2 if config.model.dtype == "bfloat16" else FP32
    total = sum(_numel(parameter) for parameter in parameters)
    trained = sum(_numel(parameter) for parameter in parameters if parameter.requires_grad)
    shape = model.config.get_text_config()
    num_moments = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
    master = int(stage > 0 or size < FP32)
    return {
        "weights": total * size // (num_ranks if stage == 3 else 1),
        "gradients": trained * FP32 // (num_ranks if stage >= 2 else 1),
        "optimizer": trained * FP32 * (num_moments + master) // (num_ranks if stage >= 1 else 1),
        "activations": activation_bytes(config, shape, num_rows, width, size),
        "head": logit_bytes(
            head_sizes(config.train.device, shape.vocab_size), shape.vocab_size, num_rows * width, size
        ),
        "calibration": _calibration_bytes(config, model, trained),
        "reference": reference,
    }


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


def _calibration_bytes(config: ResolvedConfig, model: PreTrainedModel, trained: int) -> int:
    if config.calibration.name not in ("on", "exact") and config.metrics.geometry_every == 0:
        return 0
    if config.calibration.scope == "head":
        kept = 2 * _numel(model.get_output_embeddings().weight)
    else:
        kept = 2 * trained // config.world_size()
    return kept * FP32 * (2 if config.metrics.population else 1)


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def in_words(budget: dict[str, int]) -> str:
    """One line: "weights 0.3 MB, gradients 0.3 MB, ..., together 1.2 GB"."""
    notes = {"activations": " about", "reference": ""}
    parts = [f"{name}{notes.get(name, '')} {shown(count)}" for name, count in budget.items()]
    return f"{', '.join(parts)}; together {shown(sum(budget.values()))}"


def shown(num_bytes: int) -> str:
    """In MB or GB (10^6 and 10^9 bytes)."""
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:.3g} MB" if num_bytes else "0"
    return f"{num_bytes / 1e9:.3g} GB"
