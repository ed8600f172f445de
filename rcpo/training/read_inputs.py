"""Everything a run reads, checked and tokenised: what can be wrong with it is found before a run folder
exists.

Called by `rcpo.launch.start` in the process that the user started, and by `rcpo.launch.worker` in ranks
started from it. The same config gives the same inputs on every rank."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.describe import describe_pair
from rcpo.data.filter import filter_pairs
from rcpo.data.inputs import Inputs
from rcpo.data.labels import check_labels, check_lists, labels_line, with_noise
from rcpo.data.mismatched import longest_mismatched
from rcpo.data.pairs import PackedPairs
from rcpo.data.pictures import sight_of
from rcpo.data.token_key import content_of, token_key
from rcpo.data.token_store import Tokens, TokenStore
from rcpo.data.tokenize import Tokeniser, TokenizedData
from rcpo.engine.optimizer import check_optimizer
from rcpo.engine.speedups import check_speedups
from rcpo.models.adapters import check_adapters
from rcpo.models.attention import check_attention
from rcpo.models.checks import check_model, check_positions, check_vocabulary
from rcpo.models.load import load_tokenizer
from rcpo.models.vision import check_run_with_images, check_seen
from rcpo.records.gold import GOLD
from rcpo.records.load import NOTE, PreferenceData, load_records, note_on_text
from rcpo.records.weights import weighing_of
from rcpo.reference.weights import check_reference

DECIDED_ELSEWHERE = {
    "train_batch_size": "train.pairs_per_step",
    "train_micro_batch_size_per_gpu": "train.pairs_per_device",
    "gradient_accumulation_steps": "train.pairs_per_device",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "model.dtype",
}
"""DeepSpeed's entries that would contradict what rcpo counts on, and the key that decides each."""


def check_deepspeed(config: ResolvedConfig) -> None:
    """Raise UserError where DeepSpeed would refuse `deepspeed.extra`, or rcpo decides an entry itself."""
    extra = config.deepspeed.extra
    for name, key in DECIDED_ELSEWHERE.items():
        if name in extra:
            raise UserError(f"deepspeed.extra.{name}: is decided by another key; type {key}=...")
    zero = extra.get("zero_optimization", {})
    if isinstance(zero, dict) and "stage" in zero:
        raise UserError(
            "deepspeed.extra.zero_optimization.stage: is decided by another key; type deepspeed.stage=..."
        )
    if not extra:
        return
    from deepspeed.runtime.config import DeepSpeedConfig

    from rcpo.engine.engine import deepspeed_config

    try:
        DeepSpeedConfig(deepspeed_config(config))
    # A wrong type or a wrong name can end in nearly any class there.
    except Exception as error:
        raise UserError(
            f"deepspeed.extra: DeepSpeed refuses it ({' '.join(str(error).split())[:200]}); mend that entry "
            "or leave it out"
        ) from None


class PairsRead(NamedTuple):
    """The data of a config as records and as the model's tokens, nothing filtered."""

    tokenizer: PreTrainedTokenizerBase
    records: PreferenceData
    train: TokenizedData
    held_out: TokenizedData

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.train.pairs, self.held_out.pairs, self.report, self.records.account)

    @property
    def report(self) -> list[str]:
        return [
            *self.records.report,
            *(f"training pairs: {line}" for line in self.train.report),
            *(f"held-out pairs: {line}" for line in self.held_out.report),
            *(f"{NOTE}{line}" for line in (self.held_out.notes | self.train.notes).values()),
        ]


def read_pairs(config: ResolvedConfig) -> PairsRead:
    """Check the model's files, read and tokenise the data. Raises UserError with one line for whatever is
    wrong with them."""
    read = tokenise(config, _checked_tokenizer(config))
    _check_lengths(config, read.train.pairs, read.held_out.pairs)
    return read


def _checked_tokenizer(config: ResolvedConfig) -> PreTrainedTokenizerBase:
    check_adapters(config.model)
    check_attention(config)
    check_optimizer(config)
    check_speedups(config)
    tokenizer = load_tokenizer(config.model)
    sight = sight_of(tokenizer)
    if sight is None and config.metrics.vision_gain != "others":
        raise UserError(
            f"metrics.vision_gain={config.metrics.vision_gain}: {config.model.path} reads text alone; type "
            "metrics.vision_gain=others"
        )
    if sight is not None and not sight.for_text_too:
        check_run_with_images(config, sight)
    check_vocabulary(config.model, tokenizer)
    check_model(config.model)
    return tokenizer


def reads_gold(config: ResolvedConfig) -> bool:
    """Whether rows have a gold response."""
    return config.objective_function.reading.sft_of == "gold"


def tokenise(config: ResolvedConfig, tokenizer: PreTrainedTokenizerBase) -> PairsRead:
    """Read and tokenise the data of a config; of the model its tokenizer alone is needed."""
    limits = (config.train.max_length, config.train.max_prompt_length, config.data.on_bad_row)
    written, lists = (config.model.chat_template_kwargs, config.data.append_eos), config.data.lists
    train = Tokeniser(tokenizer, *limits, *written, lists)
    # One pair a row, so that runs with best_worst and with all_pairs are measured on the same.
    held_out = Tokeniser(tokenizer, *limits, *written, "whole" if lists == "whole" else "best_worst")
    has_gold = reads_gold(config)
    named = [config.data.columns or {}, *(part.columns or {} for part in config.data.mix or ())]
    if not has_gold and (name := next((each[GOLD] for each in named if GOLD in each), None)) is not None:
        raise UserError(
            f"data.columns.gold={name}: has no effect without a term of it; type objective.sft_of=gold "
            "as well"
        )
    records = load_records(config.data, weighing_of(config.composition), train, held_out, has_gold)
    if tokenizer.chat_template is not None:
        records.report.extend(note_on_text(records, config.data))
    return PairsRead(tokenizer, records, train.data(records.train), held_out.data(records.held_out))


def _check_lengths(config: ResolvedConfig, train: PackedPairs, held_out: PackedPairs) -> None:
    check_positions(config.model, _longest(config, train, held_out))


def _longest(config: ResolvedConfig, train: PackedPairs, held_out: PackedPairs) -> int:
    """Tokens that no row exceeds, mismatched ones included where the objective needs them."""
    golden = [pairs.gold for pairs in (train, held_out) if pairs.gold is not None]
    longest = max(int(pairs.arrays.lengths.max()) for pairs in (train, held_out, *golden))
    if config.objective_function.needs_mismatched:
        longest = max(longest, longest_mismatched(train, config.train.max_length))
    return longest


def _kept_tokens(config: ResolvedConfig, tokenizer: PreTrainedTokenizerBase, keep: bool) -> Tokens:
    """The tokenised data, from the cache where they are there; made where they are not, and kept with
    `keep`."""

    def make() -> Tokens:
        read = tokenise(config, tokenizer)
        return read.tokens

    content = content_of(config.data)
    key = None
    if content is not None and not reads_gold(config):  # what is kept has no third response
        weighing = weighing_of(config.composition)
        limits = (config.train.max_length, config.train.max_prompt_length)
        key = token_key(content, config.data, weighing, limits, tokenizer, config.model.chat_template_kwargs)
    if key is None:
        return make()
    from rcpo.common.files import cache_dir

    store = TokenStore(cache_dir() / "tokens", key)
    if not keep:
        return store.read() or make()
    return store.read_or_make(make, lambda: content_of(config.data) == content)


def filtered_inputs(config: ResolvedConfig, tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> Inputs:
    """What of these tokens is trained on and held out, with the account of all rows."""
    check_lists(config, tokens.train, tokens.held_out)
    train, filtered = filter_pairs(tokens.train, config)
    account = tokens.account.after_filter(train.num_rows)
    train, num_flipped = with_noise(train, config.data)
    account = account.after_flip(num_flipped)
    kind, num_train = ("pairs", len(train)) if train.slots == 1 else ("lists", train.num_lists)
    if config.data.unpair:
        train = train.unpaired()
    check_labels(config, train, tokens.held_out)
    slots = tokens.held_out.slots
    report = [
        *account.lines(),
        *(f"{NOTE}{line}" for line in account.warnings()),
        *tokens.report,
        *filtered,
        f"{num_train} training {kind}, {tokens.held_out.num_lists} held-out {kind}",
        *labels_line(train),
        "one training pair as the model sees it:\n" + describe_pair(train[0], tokenizer),
    ]
    return Inputs(tokenizer, train, list(tokens.held_out), report, account, slots)


def check_images(
    config: ResolvedConfig, tokenizer: PreTrainedTokenizerBase, train: PackedPairs, held_out: PackedPairs
) -> None:
    """Raise UserError where what sees trains on no image, and where a model of text as well is shown some and
    the run cannot."""
    check_seen(config.model, train.num_with_images)
    sight = sight_of(tokenizer)
    if sight is not None and train.num_with_images + held_out.num_with_images:
        check_run_with_images(config, sight)


def check_sizes(config: ResolvedConfig, tokens: Tokens, num_pairs: int) -> None:
    """Raise UserError where a row is longer than the model takes, or a step takes more pairs than the
    `num_pairs` that there are to train on. Reads of the model config.json alone."""
    _check_lengths(config, tokens.train, tokens.held_out)
    if num_pairs < config.train.pairs_per_step:
        raise UserError(
            f"train.pairs_per_step={config.train.pairs_per_step}: there are only {num_pairs} training "
            f"pairs; type train.pairs_per_step={num_pairs} or less"
        )


def read_inputs(config: ResolvedConfig, keep: bool = True) -> Inputs:
    """Read, tokenise and filter the data of a resolved config; with `keep` the tokens stay in rcpo's cache.
    Raises UserError with one line for whatever cannot train."""
    check_deepspeed(config)
    tokenizer = _checked_tokenizer(config)
    tokens = _kept_tokens(config, tokenizer, keep)
    check_reference(config, tokenizer, _longest(config, tokens.train, tokens.held_out))
    inputs = filtered_inputs(config, tokenizer, tokens)
    check_images(config, tokenizer, inputs.train, tokens.held_out)
    check_sizes(config, tokens, inputs.num_train)
    return inputs
