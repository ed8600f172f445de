"""What is checked on one pair before a run: two training passes agree, and the head is the model's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    set_seed,
)

import rcpo.models.engine
import rcpo.models.load
from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.forked import in_a_fork
from helpers.rank_runs import train_here
from helpers.same_run import metrics
from helpers.tiny_models import VOCABULARY, make_llama
from rcpo.common.errors import UserError

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.4}


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS))


def phimoe() -> PreTrainedModel:
    own = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return PhimoeForCausalLM(PhimoeConfig(**own, **EXPERTS, input_jitter_noise=0.4))


def gemma3() -> PreTrainedModel:
    """As gemma-3-4b: everything about text is one level down."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=SIZES | {"sliding_window": 8}, vision_config=vision, mm_tokens_per_image=4
    )
    return Gemma3ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def saved(inputs: Path, name: str, make: Callable[[], PreTrainedModel]) -> None:
    set_seed(0)
    make().save_pretrained(inputs / name)
    AutoTokenizer.from_pretrained(inputs / "llama").save_pretrained(inputs / name)


@pytest.mark.parametrize("make", [mixtral, phimoe, gemma3])
def test_it_trains(inputs: Path, tmp_path: Path, make: Callable[[], PreTrainedModel]) -> None:
    """The router jitter of Mixtral and PhiMoE is turned off like dropout; a model whose text config is nested
    is read through it, in the memory budget too."""
    saved(inputs, make.__name__, make)
    case = Case("dpo", "on", make.__name__, "sgd")
    config = make_config(inputs, tmp_path / "run", case, Layout(1, 8), "train.steps=2")
    run = make_run(config)
    in_a_fork(lambda: train_here(run))
    assert len(metrics(run)) == 2


def refused(inputs: Path, run_dir: Path, model: str, prepare: Callable[[], None]) -> str:
    """What a run of that model is refused with."""
    config = make_config(inputs, run_dir, Case("dpo", "off", model, "sgd"), Layout(1, 8), "train.steps=2")
    run = make_run(config)

    def work() -> None:
        prepare()
        try:
            train_here(run)
        except UserError as error:
            (run_dir / "said").write_text(str(error))

    in_a_fork(work)
    return (run_dir / "said").read_text()


def test_a_model_that_draws_random_numbers_is_refused_with_the_module_that_does(
    inputs: Path, tmp_path: Path
) -> None:
    """Mixtral with its jitter left on."""
    saved(inputs, "mixtral", mixtral)

    def prepare() -> None:
        rcpo.models.load._without_randomness = lambda config: None

    said = refused(inputs, tmp_path / "run", "mixtral", prepare)
    assert "two training passes of one pair differ by" in said
    assert "layers.0.mlp" in said
    assert "draws random numbers" in said


def test_a_head_that_is_not_the_model_s_is_refused_with_both_numbers(inputs: Path, tmp_path: Path) -> None:
    """A forward method that adds to the logits what no look at its factor shows: 0.5 at every second id."""

    class Shifted(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if output.logits.shape[-1] == VOCABULARY:
                output.logits = output.logits + 0.5 * (torch.arange(VOCABULARY) % 2)
            return output

    def prepare() -> None:
        def load(config: Any) -> PreTrainedModel:
            model = Shifted(make_llama().config)
            model.load_state_dict(make_llama().state_dict())
            return model

        rcpo.models.engine.load_model = load

    said = refused(inputs, tmp_path / "run", "llama", prepare)
    assert "Shifted does more between its last hidden states and its logits than rcpo knows of" in said
    assert "by the model and" in said
