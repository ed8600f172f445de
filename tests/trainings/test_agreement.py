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
    RwkvConfig,
    RwkvForCausalLM,
    set_seed,
)

import rcpo.engine.engine
import rcpo.models.load
from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.forked import in_a_fork
from helpers.rank_runs import train_here
from helpers.same_run import metrics
from helpers.tiny_models import VOCABULARY, make_llama
from rcpo.common.errors import UserError
from rcpo.config.schema import LoraConfig, ModelConfig
from rcpo.models.targets import adapted_by, target_names

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


def rwkv() -> PreTrainedModel:
    """Whose evaluations divide the weights of its later blocks, and whose training passes multiply them."""
    own = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "rescale_every": 1}
    return RwkvForCausalLM(RwkvConfig(**own, context_length=64, bos_token_id=1, eos_token_id=2))


def test_an_evaluation_leaves_the_weights_as_they_are(tmp_path: Path) -> None:
    """RWKV's own would have halved and quartered them in final/."""
    rwkv().save_pretrained(tmp_path)
    model = rcpo.models.load.load_model(ModelConfig(path=str(tmp_path), dtype="float32"))
    before = {name: each.clone() for name, each in model.named_parameters()}
    with torch.no_grad():
        model.eval()(torch.tensor([[1, 5, 9]]), use_cache=False)
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


@pytest.mark.parametrize("make", [mixtral, phimoe, gemma3, rwkv])
def test_it_trains(inputs: Path, tmp_path: Path, make: Callable[[], PreTrainedModel]) -> None:
    """The router jitter of Mixtral and PhiMoE is turned off like dropout; a model whose text config is nested
    is read through it, in the memory budget too."""
    saved(inputs, make.__name__, make)
    case = Case("dpo", "on", make.__name__, "sgd")
    config = make_config(inputs, tmp_path / "run", case, Layout(1, 8), "train.steps=2")
    run = make_run(config)
    in_a_fork(lambda: train_here(run))
    assert len(metrics(run)) == 2


def test_adapters_go_where_text_goes(caplog: pytest.LogCaptureFixture) -> None:
    """Not beside layers of the vision tower, which have the same names: what is never run would be refused
    once training begins."""
    model = gemma3()
    for targets, num in (("all-linear", 7), (["q_proj", "down_proj"], 2)):
        names = adapted_by(model, target_names(model, LoraConfig(rank=2, targets=targets)))
        assert len(names) == num * SIZES["num_hidden_layers"]
        assert all(name.startswith("model.language_model.") for name in names)
    assert "model.vision_tower (text does not go through it)" in caplog.text
    with pytest.raises(UserError, match="fc1 is no linear layer of"):
        target_names(model, LoraConfig(rank=2, targets=["fc1"]))


def refused(inputs: Path, run_dir: Path, model: str, prepare: Callable[[], None], *words: str) -> str:
    """What a run of that model is refused with."""
    case = Case("dpo", "off", model, "sgd")
    config = make_config(inputs, run_dir, case, Layout(1, 8), "train.steps=2", *words)
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
        def load(config: Any, device: torch.device) -> PreTrainedModel:
            model = Shifted(make_llama().config)
            model.load_state_dict(make_llama().state_dict())
            return model

        rcpo.engine.engine.load_model = load

    said = refused(inputs, tmp_path / "run", "llama", prepare)
    assert "Shifted does more between its last hidden states and its logits than rcpo knows of" in said
    assert "by the model and" in said


def loading(change: Callable[[PreTrainedModel], None]) -> Callable[[], None]:
    """Lets a run load the tiny Llama with a change."""

    def prepare() -> None:
        def load(config: Any, device: torch.device) -> PreTrainedModel:
            model = make_llama()
            change(model)
            return model

        rcpo.engine.engine.load_model = load

    return prepare


def looks_ahead(model: PreTrainedModel) -> None:
    """Every hidden state has the row's last one in it."""
    norm = model.model.norm
    norm.register_forward_hook(lambda module, inputs, output: output + output[:, -1:])


def test_a_model_that_looks_ahead_is_refused(inputs: Path, tmp_path: Path) -> None:
    """Its head is its own and it draws nothing; only rows that stand beside longer ones tell."""
    said = refused(inputs, tmp_path / "run", "llama", loading(looks_ahead))
    assert "LlamaForCausalLM lets a token depend on what follows it or on its row's neighbours" in said
    assert "on a row of its own and" in said


def trains_otherwise(model: PreTrainedModel) -> None:
    """Hidden states are three times as large in a training pass, every time."""
    model.model.norm.register_forward_hook(
        lambda module, inputs, output: output * (3 if module.training else 1)
    )


def test_a_model_that_is_another_function_while_it_trains_is_refused(inputs: Path, tmp_path: Path) -> None:
    said = refused(inputs, tmp_path / "run", "llama", loading(trains_otherwise))
    assert "LlamaForCausalLM is another function in a training pass than in an evaluation" in said
    assert "give another model" in said


def has_a_state(model: PreTrainedModel) -> None:
    """Every hidden state has the running mean of the row in it, whatever mask and positions say."""

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        places = torch.arange(1, output.shape[1] + 1)[None, :, None]
        return output + output.cumsum(1) / places

    model.model.norm.register_forward_hook(hook)


def refuses_masks(model: PreTrainedModel) -> None:
    def hook(module: Any, inputs: Any, given: dict[str, Any]) -> None:
        if given.get("attention_mask") is not None:
            raise ValueError("too many values to unpack")

    model.model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("key", ["share_prefix", "packing"])
def test_a_joint_layout_that_gives_other_numbers_is_refused(inputs: Path, tmp_path: Path, key: str) -> None:
    """GPT-Neo's z was off by a nat, Falcon with alibi ended in a traceback: neither says so in its config."""
    for number, (change, reason) in enumerate(
        ((has_a_state, "a token's log-probability is"), (refuses_masks, "too many values to unpack"))
    ):
        run_dir = tmp_path / str(number)
        said = refused(inputs, run_dir, "llama", loading(change), f"train.{key}=true")
        assert said.startswith(
            f"train.{key}=true: LlamaForCausalLM cannot have sequences side by side on a row: {reason}"
        )
        assert said.endswith(f"; type train.{key}=false")


class Around(torch.nn.Module):
    """Reads a layer's weight without calling it, as kernels of state-space models do."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.layer.weight.T


def test_an_adapter_that_is_gone_around_is_refused(inputs: Path, tmp_path: Path) -> None:
    def prepare() -> None:
        load = rcpo.engine.engine.load_model

        def changed(config: Any, device: torch.device) -> PreTrainedModel:
            model = load(config, device)
            for block in model.model.layers:
                block.self_attn.o_proj = Around(block.self_attn.o_proj)
            return model

        rcpo.engine.engine.load_model = changed

    said = refused(inputs, tmp_path / "run", "llama", prepare, "model.lora.rank=2")
    assert said == (
        "model.lora.targets: LlamaForCausalLM reads the weight of layer without calling it, so an adapter "
        "there does nothing; type model.lora.targets=[NAME,...] without it"
    )
