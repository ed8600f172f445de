"""What a run trains on, once read, tokenised and filtered; `rcpo.training.read_inputs` makes it."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rcpo.config.resolved import ResolvedConfig
from rcpo.data.mismatched import Mismatch, MismatchedPairs
from rcpo.data.pairs import PackedPairs, TokenizedPair
from rcpo.data.sampler import PairSampler
from rcpo.records.account import Account


@dataclass(frozen=True)
class Inputs:
    tokenizer: PreTrainedTokenizerBase
    train: PackedPairs
    held_out: list[TokenizedPair]
    report: list[str]
    """What was read, dropped and cut, and one example; for the log."""
    account: Account
    """What became of every row."""

    @property
    def pad_id(self) -> int:
        """Any valid id serves: padding is never attended to and never scored."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def sampler(self, config: ResolvedConfig) -> PairSampler:
        return PairSampler(len(self.train), config.train.pairs_per_step, config.seed, self.train.widths())

    def mismatched(self, which: Sequence[Mismatch], config: ResolvedConfig) -> MismatchedPairs:
        """Prompts and responses of these training pairs, put together."""
        return MismatchedPairs(self.train, which, config.train.max_length)

    def num_steps(self, config: ResolvedConfig) -> int:
        """Optimizer steps of the whole run."""
        return config.train.num_steps(self.sampler(config).steps_of)
