"""The memory budget of a rank and the ZeRO stage that follows, by hand, for the shape of an 8B Llama on the
meta device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import rcpo.launch.stage
from helpers.selection import matrix
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.validate import validate
from rcpo.engine.memory import allowed_stages, fitting_stage, memory_budget
from rcpo.models.adapters import add_adapters

HEAD = 128256 * 4096
"""525,336,576 numbers; the embedding has as many."""
P = 2 * HEAD + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096
"""8,030,261,248: embedding and head, 32 blocks (q and o, k and v, three of the MLP, two norms), a norm."""
ROWS, WIDTH = 8, 1024
"""Micro-batches of 4 pairs."""


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make_llama()


def make_llama() -> PreTrainedModel:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
            )
        )  # fmt: skip


def config_of(tmp_path: Path, ranks: int, *words: str) -> ResolvedConfig:
    """Of so many GPUs of one node, wherever this runs."""
    own = [
        "model=hf", f"model.path={tmp_path}", "model.dtype=bfloat16", "train.device=cuda", "data=hh_rlhf",
        f"launch.gpus_per_node={ranks}", "train.pairs_per_step=64", "train.pairs_per_device=4",
        "model.gradient_checkpointing=true",
    ]  # fmt: skip
    tree = compose([*own, *words])
    assert tree is not None
    return resolve(validate(tree), ranks, device_is_elsewhere=True)


BLOCK = (9 * 4096 + 4 * 14336) * 2 + 2 * 4096 * 4
CHECKPOINTED = ROWS * WIDTH * (32 * 4096 * 2 + BLOCK)
"""3.96 GB; 58 GB without gradient checkpointing."""
LOGITS = (4 + 2) * 2048 * 128256 + 2 * 10**9
"""A chunk of 2,048 tokens in fp32 and in bf16, and the errors that are kept."""
HEAD_BYTES = LOGITS + 4 * 2 * HEAD
CALIBRATION = 4 * (2 * HEAD + 2 * HEAD // 8)
BUCKET = 4 * 500_000_000
EIGHT_GPUS: dict[int, dict[str, int]] = {
    # bf16 weights 16.1 GB, fp32 sums of gradients 32.1 + a cast of 2.1, masters and moments 96.4 / 8
    1: {"weights": 2 * P, "gradients": 4 * P + 4 * HEAD, "optimizer": 12 * P // 8, "exchange": 0},
    2: {"weights": 2 * P, "gradients": 4 * P // 8, "optimizer": 12 * P // 8, "exchange": 2 * BUCKET},
    3: {
        "weights": 2 * P // 8 + 2 * 10**9, "gradients": 4 * P // 8, "optimizer": 12 * P // 8,
        "exchange": BUCKET,
    },
}  # fmt: skip


@pytest.mark.parametrize("stage", EIGHT_GPUS)
def test_the_budget_of_8b_on_8_gpus(llama: PreTrainedModel, tmp_path: Path, stage: int) -> None:
    """Full fine-tuning in bf16 with AdamW and calibration=on: 78.9 GB at stage 1, 52.6 GB at 2, 38.5 GB at 3.
    The flat gradient, 4 P / 8, comes when activations and head are gone."""
    config = config_of(tmp_path, 8, "calibration=on", f"deepspeed.stage={stage}")
    assert sum(parameter.numel() for parameter in llama.parameters()) == P
    budget = memory_budget(config, llama, ROWS, WIDTH)
    share = 4 * P // 8 if stage < 3 else min(4 * P // 8, 4 * 10**9)
    rest = {
        "activations": CHECKPOINTED, "head": HEAD_BYTES, "calibration": CALIBRATION, "reference": 0,
        "update": max(0, share - CHECKPOINTED - HEAD_BYTES),
    }  # fmt: skip
    assert budget == EIGHT_GPUS[stage] | rest
    total = {1: 78.9e9, 2: 52.6e9, 3: 38.5e9}[stage]
    assert sum(budget.values()) == pytest.approx(total, rel=0.01)


def test_gradients_that_stay_in_bf16_too(llama: PreTrainedModel, tmp_path: Path) -> None:
    """What DeepSpeed would do by itself at stage 1: 2 P more, which rcpo turns off."""
    word = "deepspeed.extra={bf16: {immediate_grad_update: false}}"
    config = config_of(tmp_path, 8, "deepspeed.stage=1", word)
    assert memory_budget(config, llama, ROWS, WIDTH)["gradients"] == 4 * P + 2 * P


def test_an_adapter_and_4_bit_weights(tmp_path: Path) -> None:
    """Rank 16 on q of 32 blocks trains 16 (4096 + 4096) numbers each. In 4 bits the seven matrices of a block
    take .516 bytes a number, embedding, head and norms two."""
    words = (
        "model.lora.rank=16", "model.lora.targets=[q_proj]", "model.lora.save=adapter",
        "model.quantization=4bit", "calibration=on", "calibration.scope=lora_last",
    )  # fmt: skip
    config, model = config_of(tmp_path, 1, *words), make_llama()
    with torch.device("meta"):
        add_adapters(model, config.model, str(tmp_path))
    trained = 32 * 16 * (4096 + 4096)
    in_blocks = P - 2 * HEAD - 65 * 4096
    budget = memory_budget(config, model, ROWS, WIDTH, stage=1)
    quantized = 2 * (2 * HEAD + 65 * 4096 + trained) + 0.516 * in_blocks
    assert budget["weights"] == pytest.approx(quantized, rel=1e-6)
    assert budget["gradients"] == 4 * trained + 4 * 16 * 4096
    assert budget["optimizer"] == 12 * trained
    assert budget["head"] == LOGITS
    assert budget["calibration"] == 4 * 2 * trained // 32


def test_exact_holds_shards_and_two_buckets(llama: PreTrainedModel, tmp_path: Path) -> None:
    config = config_of(tmp_path, 8, "calibration=exact", "deepspeed.stage=2")
    assert memory_budget(config, llama, ROWS, WIDTH)["calibration"] == 4 * (2 * P // 8 + 2 * 2**24)


@pytest.mark.parametrize(
    ("ranks", "gib", "words", "stage"),
    matrix(
        [
            (8, 80, (), 1),
            (8, 80, ("calibration=on",), 2),
            (8, 80, ("reference=live",), 2),
            (8, 64, (), 2),
            (8, 40, (), 3),
            (8, 16, (), 3),
            (2, 80, (), 3),
            (1, 16, ("model.lora.rank=16", "model.lora.save=adapter", "model.quantization=4bit"), 1),
            (8, 4, ("model.lora.rank=16", "model.lora.save=adapter", "model.quantization=4bit"), 2),
        ],
        lambda row: not row[2],
        "ZeRO stages by memory",
    ),
)
def test_the_lowest_stage_that_fits(
    llama: PreTrainedModel, tmp_path: Path, ranks: int, gib: int, words: tuple[str, ...], stage: int
) -> None:
    """None fits into 16 GiB: the highest, and the rehearsal tells. 4-bit weights are not sharded here."""
    config = config_of(tmp_path, ranks, "calibration=off", *words)
    model = llama
    if config.model.lora.rank is not None:
        model = make_llama()
        with torch.device("meta"):
            add_adapters(model, config.model, str(tmp_path))
    assert fitting_stage(config, model, ROWS, WIDTH, gib * 2**30) == stage
    assert stage in allowed_stages(config)


def test_a_given_stage_stays_and_a_null_is_decided_at_the_start(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Train:
        slots = 1

        @staticmethod
        def widths() -> list[int]:
            return [100, WIDTH]

    class Read:
        train = Train()

    inputs: Any = Read()
    monkeypatch.setattr(rcpo.launch.stage, "shapes_of", lambda config: llama)
    monkeypatch.setattr(rcpo.launch.stage, "smallest_memory", lambda: 64 * 2**30)
    given = config_of(tmp_path, 8, "deepspeed.stage=3")
    assert rcpo.launch.stage.with_stage(given, inputs) is given
    left_open = config_of(tmp_path, 8)
    assert left_open.deepspeed.stage is None
    assert left_open.zero_stage == 1
    assert rcpo.launch.stage.with_stage(left_open, inputs).deepspeed.stage == 2
