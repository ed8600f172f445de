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
    held_out_slots: int = 1
    """How many held-out pairs, one after the other, hold a list of responses (`rcpo.data.lists`)."""

    @property
    def kind(self) -> str:
        """What is trained on, in a word."""
        return "pairs" if self.train.slots == 1 else "lists"

    @property
    def num_train(self) -> int:
        """Training pairs, or lists."""
        return self.train.num_lists

    @property
    def num_held_out(self) -> int:
        """Held-out pairs, or lists."""
        return len(self.held_out) // self.held_out_slots

    @property
    def sees(self) -> bool:
        """Whether any pair has an image."""
        held_out = any(pair.pictures is not None for pair in self.held_out)
        return held_out or self.train.num_with_images > 0

    def num_probed(self, config: ResolvedConfig) -> int:
        """Held-out pairs of the probe: its pairs, or all slots of its lists."""
        return config.calibration.probe_pairs * self.held_out_slots

    @property
    def pad_id(self) -> int:
        """Any valid id serves: padding is never attended to and never scored."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def sampler(self, config: ResolvedConfig) -> PairSampler:
        slots = self.train.slots
        widths = self.train.widths()
        of_lists = [max(widths[first : first + slots]) for first in range(0, len(widths), slots)]
        return PairSampler(self.num_train, config.train.pairs_per_step, config.seed, of_lists, slots)

    def mismatched(self, which: Sequence[Mismatch], config: ResolvedConfig) -> MismatchedPairs:
        """Prompts and responses of these training pairs, put together."""
        return MismatchedPairs(self.train, which, config.train.max_length)

    def num_steps(self, config: ResolvedConfig) -> int:
        """Optimizer steps of the whole run."""
        return config.train.num_steps(self.sampler(config).steps_of)
