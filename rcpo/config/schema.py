"""The typed config: frozen dataclasses, their meaning field by field, and the one validation of a composed
tree.

Types, ranges and meanings stand here, defaults in `conf/*.yaml`, each once: `IN_CONF` reads them there for a
config that lacks the key, because its option has no use for it or an older rcpo froze it. A default written
here is another than users get from conf/, and says why.

After `rcpo.config.validate` the rest of rcpo sees only `Config`. Null means
"rcpo decides": `rcpo.config.resolve` fills those in, before the config is frozen."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic.dataclasses import dataclass

from rcpo.common.conf import IN_CONF, defaults_in
from rcpo.config.calibration import CalibrationConfig
from rcpo.config.evaluation import EvaluationConfig
from rcpo.config.optim import OptimConfig
from rcpo.config.reference import ReferenceConfig
from rcpo.config.tracking import MetricsConfig, TrackingConfig
from rcpo.config.types import STRICT, NonNegative, Paths, Positive, Seed, Stage, Text

Attention = Literal[
    "eager",
    "sdpa",
    "varlen",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "kernels-community/flash-attn2",
    "kernels-community/flash-attn3",
    "kernels-community/vllm-flash-attn3",
]


def _list_of_names(value: object) -> object:
    return [value] if isinstance(value, str) and value != "all-linear" else value


@dataclass(frozen=True, config=STRICT)
@defaults_in("every_model lora")
class LoraConfig:
    rank: Annotated[int, Field(gt=0, le=65536)] | None = IN_CONF
    """Rank of the trained adapter (LoRA, arXiv 2106.09685); null: no adapter, every parameter trains."""
    alpha: Annotated[float, Field(gt=0)] | None = IN_CONF
    """The adapter's product is scaled by alpha / rank; null: 2 * rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = IN_CONF
    """Share of an adapted layer's inputs dropped before A in training passes; above 0 a step is random."""
    targets: Annotated[Literal["all-linear"] | list[Text], BeforeValidator(_list_of_names)] = IN_CONF
    """Linear layers to adapt: names, or all but the output projection."""
    adapter: Text | None = IN_CONF
    """Folder or hub id of an adapter to start from, of SFT say; the reference has it too."""
    adapter_revision: Text | None = IN_CONF
    """Branch, tag or commit of a hub id in adapter, as model.revision."""
    on_adapter: Literal["merge", "stack"] | None = IN_CONF
    """merge: add `adapter` to the base weights; stack: keep it, frozen, beside the new one. No default."""
    save: Literal["merged", "adapter"] = IN_CONF
    """merged: final/ is a whole model, which needs neither peft nor the base model; adapter: peft's files."""


@dataclass(frozen=True, config=STRICT)
@defaults_in("every_model")
class ModelConfig:
    path: Text
    """builtin:tiny, builtin:tiny_vision, a folder with safetensors weights, or a hub id."""
    revision: Text | None = IN_CONF
    """Branch, tag or commit of a hub id; null: its main branch. The run keeps the commit that it found."""
    dtype: Literal["auto", "float32", "bfloat16"] = IN_CONF
    """Dtype of weights and activations; log-probs are fp32 always. auto: float32 on CPU, bfloat16 on GPUs."""
    attention: Attention | None = IN_CONF
    """Attention kernel; null: the model's default, mostly sdpa. For train.packing varlen (torch's own), flash
    attention from a wheel, or kernels-community/... from the hub; for train.share_prefix flex_attention. All
    but eager and sdpa need GPUs."""
    kernels: Literal["liger"] | None = IN_CONF
    """liger: RMSNorm, SwiGLU (or GeGLU) and rotary positions by Liger's kernels (liger-kernel, GPUs only);
    null: the model's own."""
    compile: bool = IN_CONF
    """Compile each layer by torch.compile: minutes at the start, and again for unusual widths."""
    gradient_checkpointing: bool = IN_CONF
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = IN_CONF
    """Run Python code that lies in the model's folder."""
    allow_pickle: bool = IN_CONF
    """Load pickled weights (*.bin) where there are no safetensors: their tensors alone, never their code."""
    chat_template: Text | None = IN_CONF
    """null: the tokenizer's own; plain: rcpo's; else a jinja file."""
    chat_template_kwargs: dict[str, Any] = IN_CONF
    """What the chat template is given beside the messages: '{enable_thinking: false}'. A row's own column
    chat_template_kwargs comes on top."""
    response: Literal["template", "verbatim"] = IN_CONF
    """template: a response is what the chat template makes of it. verbatim: its content as it is, behind the
    generation prompt; for templates that cut reasoning out."""
    router_loss: Annotated[float, Field(ge=0, le=1e3)] = IN_CONF
    """What the load-balancing loss of a mixture of experts counts beside the objective's; 0: nothing, and no
    pass for it."""
    vision: Literal["frozen", "projector", "train", "lora"] = IN_CONF
    """What trains of the parts of a vision-language model that see, beside its language model. frozen:
    nothing. projector: what lies between its tower and the text. train: both. lora: with model.lora.rank,
    adapters on the linear layers of both; their own weights stay."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """Train a low-rank adapter in place of the weights."""
    quantization: Literal["4bit"] | None = IN_CONF
    """4bit: hold the frozen base weights as nf4 (bitsandbytes; slow on CPUs); needs an adapter to train."""


Percentile = Annotated[float, Field(gt=0, le=100)]
LowPercentile = Annotated[float, Field(ge=0, lt=100)]
AnyPercentile = Annotated[float, Field(ge=0, le=100)]


@dataclass(frozen=True, config=STRICT)
@defaults_in("data_filter")
class FilterConfig:
    scores: Text | None = IN_CONF
    """Scores of the training pairs: a file that `rcpo score` wrote, with this model's tokens. The keys below
    need it."""
    ches_max_percentile: Percentile | None = IN_CONF
    """Leave out training pairs with a CHES (arXiv 2410.08847) above this percentile; 95 leaves out 5 %."""
    ches_min_percentile: LowPercentile | None = IN_CONF
    """Leave out training pairs with a CHES below this percentile."""
    ches_near_percentile: AnyPercentile | None = IN_CONF
    """Train on the `nearest` pairs around this percentile of CHES, by their place in its order: 0 is the
    lowest, 100 the highest."""
    ches_norm_max_percentile: Percentile | None = IN_CONF
    """The same of length-normalised CHES, for responses of different lengths; the paper filters by it, and
    keeps the lowest 5 %."""
    ches_norm_min_percentile: LowPercentile | None = IN_CONF
    """Leave out training pairs with a length-normalised CHES below this percentile."""
    ches_norm_near_percentile: AnyPercentile | None = IN_CONF
    """`ches_near_percentile` of length-normalised CHES."""
    nearest: Positive | None = IN_CONF
    """How many pairs `ches_near_percentile` or `ches_norm_near_percentile` keeps."""
    margin_min: float | None = IN_CONF
    """Leave out training pairs with a margin z_w - z_l under the scoring model below this, in nats."""
    margin_max: float | None = IN_CONF
    """Leave out training pairs with a margin above this, in nats."""


@dataclass(frozen=True, config=STRICT)
class MixPart:
    path: Paths
    weight: Annotated[float, Field(gt=0)]
    split: Text | None = None
    config: Text | None = None
    columns: dict[str, str] | None = None


def _mix(value: object) -> object:
    """{PATH: WEIGHT, ...}, or a list of mappings with more keys, as a list of `MixPart`."""
    if isinstance(value, dict):
        value = [{"path": path, "weight": weight} for path, weight in value.items()]
    is_list = isinstance(value, list) and value and all(isinstance(part, dict | MixPart) for part in value)
    if not isinstance(value, list) or not is_list:
        raise ValueError("must be {PATH: WEIGHT, PATH: WEIGHT}, or a list of {path: PATH, weight: WEIGHT}")
    for part in value:
        keys = {"path", "weight"} if isinstance(part, MixPart) else set(part)
        if not {"path", "weight"} <= keys <= {"path", "weight", "split", "config", "columns"}:
            raise ValueError(
                "must have path and weight of each source; it may have split, config and columns"
            )
    try:
        return [part if isinstance(part, MixPart) else MixPart(**part) for part in value]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        rule = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise ValueError(f"{first['loc'][0]}={first['input']!r} {rule}") from None


Mix = Annotated[list[MixPart], BeforeValidator(_mix)]


@dataclass(frozen=True, config=STRICT)
@defaults_in("data/file", "every_data")
class DataConfig:
    source: Literal["arithmetic", "shapes", "file"]
    """arithmetic: generated word problems. shapes: generated pictures with questions. file: anything that
    `path` names."""
    path: Paths | None = IN_CONF
    """File, glob ('pairs/*.jsonl'), folder or hub id, or a list of them ('[a.jsonl, b.csv]'); for
    source=file."""
    config: Text | None = IN_CONF
    """Which of the data set's configs, where `path` has several."""
    revision: Text | dict[str, Text] | None = IN_CONF
    """Branch, tag or commit of the data sets that are hub ids, or {ID: REVISION, ...}; null: main. The run
    keeps the commits that it found."""
    split: Text | None = IN_CONF
    """Training split where `path` has several, or a slice of it, as `datasets` spells them: 'train[:10%]',
    'train[100:200]', 'train+test'. The split of a file is train."""
    mix: Mix | None = IN_CONF
    """Several sources in fixed proportions, in place of `path`: '{a.jsonl: 0.7, b.jsonl: 0.3}', or a list of
    {path: PATH, weight: WEIGHT}, each of which may have split, config and columns. As many pairs are drawn by
    data.seed as the proportions allow with no pair twice."""
    eval_path: Paths | None = IN_CONF
    """Held-out pairs of their own."""
    eval_config: Text | None = IN_CONF
    """Config of the held-out pairs; null: that of eval_path where it has one only, or that of path."""
    eval_split: Text | None = IN_CONF
    """Held-out split of eval_path, or of path, or a slice of it; null: of path a split called validation,
    dev, eval, test or the like, where it has one."""
    train_pairs: Positive | None = IN_CONF
    """At most this many training pairs; null: all."""
    eval_pairs: Positive = IN_CONF
    """Held-out pairs: at most this many of the held-out set, or drawn from the training pairs where there is
    none; a fifth of them where fewer than a fifth would be left to train on."""
    seed: Seed = IN_CONF
    """Fixes which pairs are held out (and which are generated, where they are)."""
    on_bad_row: Literal["error", "drop"] = "error"  # conf/ has drop for files; a bad problem is rcpo's own
    """A row that cannot train: stop with its number and reason, or drop and count it."""
    as_chat: bool | None = IN_CONF
    """Text pairs (a prompt and two responses) under a model with a chat template. true: the prompt is a user
    turn, the responses are assistant turns. false: plain text. null: plain text, and a note says so."""
    system: Literal["keep", "merge", "drop"] = IN_CONF
    """What becomes of a system turn at the head of a prompt. keep: the chat template has it. merge: it stands
    before the first user turn's text, with a blank line between; for templates that refuse system turns.
    drop: it is left out."""
    columns: dict[str, str] | None = IN_CONF
    """{prompt: NAME, chosen: NAME, rejected: NAME} where a file uses other names, {prompt: NAME, completion:
    NAME, label: NAME} for single answers, {messages: NAME} for conversations, {prompt: NAME, responses: NAME,
    scores: NAME} for lists (or ranks in the place of scores); also {gold: NAME} with objective.sft_of=gold,
    {weight: NAME} or {probability: NAME} with objective.sample_weight."""
    append_eos: bool = IN_CONF
    """false: a response ends with its own last token. Neither the EOS nor what the chat template writes to
    end a turn is trained on, of training and held-out pairs alike. For experiments on single tokens."""
    image_megapixels: Annotated[int, Field(ge=1, le=178)] = IN_CONF
    """Million pixels that an image may have; a row with a larger one cannot train. Up to 178, twice what
    Pillow warns of."""
    unpair: bool = IN_CONF
    """true: each training pair is read as two single answers, the chosen and the rejected one, which are
    drawn by themselves. Held-out pairs stay pairs."""
    lists: Literal["whole", "best_worst", "all_pairs"] = IN_CONF
    """What becomes of rows of several responses. best_worst: a pair of the best and the worst one. all_pairs:
    a pair of every two of which one is better, weighed so that each row counts alike. whole: a list, for a
    listwise objective. Held-out rows are lists with whole, else pairs of the best and the worst one."""
    responses: Annotated[int, Field(ge=2, le=5)] = IN_CONF
    """Answers to each problem of source=arithmetic: the right one and wrong ones, of which there may be too
    few; from 3 on a row is a list, scored by how near an answer is."""
    flip: Annotated[float, Field(ge=0, le=1)] = IN_CONF
    """Label noise: share of the training pairs, drawn by data.seed, whose chosen and rejected are
    exchanged."""
    filter: FilterConfig = Field(default_factory=FilterConfig)
    """Training pairs that are left out by their scores."""

    def train_paths(self) -> list[str]:
        """What training pairs are read from."""
        return [*_listed(self.path), *(path for part in self.mix or () for path in _listed(part.path))]

    def eval_paths(self) -> list[str]:
        """What held-out pairs are read from where that is another place."""
        return _listed(self.eval_path)

    def revision_of(self, path: str) -> str | None:
        """Of a hub id."""
        return self.revision.get(path) if isinstance(self.revision, dict) else self.revision

    def paths(self) -> list[str]:
        """All that is read."""
        return [*self.train_paths(), *self.eval_paths()]


def _listed(paths: str | list[str] | None) -> list[str]:
    return [paths] if isinstance(paths, str) else paths or []


@dataclass(frozen=True, config=STRICT)
@defaults_in("deepspeed/zero")
class DeepSpeedConfig:
    stage: Stage | None = IN_CONF
    """ZeRO stage: 0 nothing sharded, 1 optimizer state, 2 and gradients, 3 and weights; null: the lowest
    from 1 on with which a run fits into its GPUs' memory, on CPUs 1."""
    offload: Literal["none", "optimizer"] = IN_CONF
    """optimizer: its state lives in CPU memory (stages 1 to 3)."""
    extra: dict[str, Any] = IN_CONF
    """DeepSpeed config entries that win over rcpo's."""


@dataclass(frozen=True, config=STRICT)
@defaults_in("config train")
class TrainConfig:
    steps: Annotated[int, Field(gt=0, le=10**9)] | None = IN_CONF
    """Optimizer steps; null with epochs null: 150 for generated data, else one epoch."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = IN_CONF
    """Passes over the training pairs, rounded up to whole steps; steps or epochs, not both."""
    pairs_per_step: Positive = IN_CONF
    """Global batch: pairs of one optimizer step over all ranks."""
    pairs_per_device: Positive | None = IN_CONF
    """Micro-batch of one rank; null: the largest divisor of its share up to 16 (builtin:NAME), 4 (CPUs), or
    on GPUs 8192 / max_length, from 4 to 16."""
    max_length: Annotated[int, Field(ge=2, le=10**8)] = IN_CONF
    """Tokens of prompt + response; responses are cut from the right."""
    max_prompt_length: Positive | None = IN_CONF
    """Tokens of the prompt, cut from the left; null: what the longer response leaves of max_length, at least
    half."""
    eval_every: NonNegative | None = IN_CONF
    """Optimizer steps between evaluations; 0: only at the start and the end; null: 25 for builtin:NAME, else
    100."""
    stop_when: Text | None = IN_CONF
    """End the run, as done, after the first evaluation of which this holds: KEY <, <=, > or >= NUMBER,
    several joined by `and` or `or`, of the keys of eval.jsonl with eval/ before them."""
    keep_best: Text | None = IN_CONF
    """Keep the weights of the evaluation with the largest KEY in RUN/best, as a model folder; min:KEY: the
    smallest, as of eval/loss and the shares chosen_down and both_down by themselves. The start does not
    count."""
    share_prefix: bool = IN_CONF
    """Compute the prompt of a pair once for both responses: less work where prompts are long, the same
    gradient to rounding. Steps that `exact` measures do without."""
    packing: bool = IN_CONF
    """Put a micro-batch on one row, without padding; for kernels that skip what is masked
    (model.attention=varlen and the others of flash attention). Steps that `exact` measures do without."""
    evaluate: Text | None = IN_CONF
    """Ask the trained model the tasks of this option of the group `evaluation` at the end of the run, as
    `rcpo evaluate` does, into RUN/evaluation.json and the tracker (downstream/TASK); null: do not. Where that
    fails, the run is done all the same."""
    save_every: NonNegative = IN_CONF
    """Optimizer steps between checkpoints; 0: none."""
    keep_last: Positive | None = IN_CONF
    """Checkpoints that are kept, the newest ones; null: all."""
    on_save_error: Literal["continue", "stop"] = IN_CONF
    """A checkpoint that cannot be written, on a full disk say: warn and go on, or stop with exit code 4."""
    on_nonfinite: Literal["stop", "skip"] = IN_CONF
    """A loss, log-probability or gradient that is not finite: stop before the weights change, with a
    checkpoint and exit code 3, or leave the step out and count it in train/nonfinite_steps."""
    max_nonfinite_steps: Positive = IN_CONF
    """Steps that on_nonfinite=skip may leave out before the run stops all the same."""
    log_every: Positive = IN_CONF
    """Steps between lines on a console that is not a terminal."""
    grad_clip: Annotated[float, Field(ge=0)] = IN_CONF
    """Largest global gradient norm; 0: no clipping."""
    device: Literal["auto", "cpu", "cuda"] = IN_CONF
    deterministic: bool = IN_CONF
    """Algorithms of torch, cuBLAS and flash attention that give the same bits twice, on GPUs too; slower. A
    kernel without one is an error."""


@dataclass(frozen=True, config=STRICT)
@defaults_in("config launch")
class LaunchConfig:
    processes: Annotated[int, Field(gt=0, le=1024)] = IN_CONF
    """Ranks on CPU."""
    gpus_per_node: Positive | None = IN_CONF
    """Ranks on the GPUs of a node; null: 1 where a GPU is present."""
    nodes: Positive = IN_CONF
    """Nodes; more than 1 needs torchrun or srun to start the ranks."""


@dataclass(frozen=True, config=STRICT)
@defaults_in("config")
class Config:
    objective: dict[str, Any]
    """name, parameters and keys that all objectives have; `rcpo.objectives` checks them."""
    calibration: CalibrationConfig
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    deepspeed: DeepSpeedConfig
    tracking: TrackingConfig
    train: TrainConfig
    metrics: MetricsConfig
    launch: LaunchConfig
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    name: Text | None = IN_CONF
    run_dir: Text | None = IN_CONF
    seed: Seed = IN_CONF

    def world_size(self) -> int:
        """Ranks of the run, once `rcpo.config.resolve` has filled in the launch section."""
        return self.launch.nodes * (self.launch.gpus_per_node or self.launch.processes)
