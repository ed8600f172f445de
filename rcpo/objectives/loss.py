"""What an objective is: `PairLogProbs` (what a loss sees), `BatchStatistic` and `Objective` (a loss with its
parameters).

Knows no formula and no names: those are in the family files beside it and in `rcpo.objectives.registry`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcpo.objectives.parameters import config_key
from rcpo.objectives.reading import AS_WRITTEN, Reading


def sides_there(lengths: Tensor, are_whole: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """len_w, len_l and present of `PairLogProbs`, of response tokens per side (2B,), chosen sides first, 0
    where one is missing; `are_whole`: whether none is."""
    len_w, len_l = lengths.clamp(min=1).chunk(2)
    if are_whole:
        return len_w, len_l, None
    has_w, has_l = (lengths > 0).to(lengths.dtype).chunk(2)
    return len_w, len_l, (has_w, has_l)


class Lists(NamedTuple):
    """Which of a batch's responses make a list: L lists of at most N responses, on S pairs each, which stand
    one after the other (`rcpo.data.lists`)."""

    order: Tensor
    """(L, N) int64, best first: which of a list's 2S sides, the chosen ones first, each response is."""
    there: Tensor
    """(L, N) bool: whether there is a response of this rank."""
    scores: Tensor
    """(L, N) floating: the responses' scores, the highest is best; 0 where there is none."""

    def ranked(self, of_chosen: Tensor, of_rejected: Tensor) -> Tensor:
        """Numbers of a batch's sides, (B,) each, as (L, N), best response first."""
        num_lists = len(self.order)
        both = torch.cat([of_chosen.view(num_lists, -1), of_rejected.view(num_lists, -1)], dim=1)
        return both.gather(1, self.order)

    def worse(self) -> Tensor:
        """(L, N, N) bool: whether response j of a list is worse than its response k, at [list, k, j]. Of
        equal scores neither is."""
        is_there = self.there[:, :, None] & self.there[:, None, :]
        return is_there & (self.scores[:, None, :] < self.scores[:, :, None])

    def last(self) -> Tensor:
        """(L, 1) int64: the rank of each list's worst response."""
        return self.there.sum(1, keepdim=True) - 1

    def to(self, device: torch.device) -> "Lists":
        return Lists(*(each.to(device) for each in self))


class PairLogProbs(NamedTuple):
    """What an objective sees of a batch of B pairs; every tensor is (B,) and floating point."""

    z_w: Tensor
    """log pi(y_w|x), summed over the chosen response's tokens, in nats; averaged in what `averaged` makes."""
    z_l: Tensor
    """log pi(y_l|x) of the rejected response, likewise."""
    ref_w: Tensor
    """z_w under the frozen reference; zeros where the objective declares `needs_reference=False`."""
    ref_l: Tensor
    """z_l under the frozen reference."""
    len_w: Tensor
    """|y_w|, what turns z_w into a mean over tokens: the chosen response's tokens, at least 1; 1 where z_w is
    that mean already."""
    len_l: Tensor
    """|y_l| of the rejected response, likewise."""
    state: tuple[float, ...] = ()
    """The objective's batch statistics (`BatchStatistic`); () stands for their values at the start."""
    tokens: tuple[Tensor, Tensor] | None = None
    """The responses' tokens where z is averaged, and len_w, len_l are 1; None: len_w, len_l."""
    reading: Reading = AS_WRITTEN
    """Switches that formulas share."""
    mean_tokens: float | None = None
    """Mean of the chosen responses' tokens over the global batch, where a likelihood term is a mean over its
    tokens; None: of these pairs."""
    partners: tuple[Tensor, Tensor] | None = None
    """What each side is compared with in the global batch, where the loss compares ranks (`Match`); (B,), no
    gradient."""
    present: tuple[Tensor, Tensor] | None = None
    """1 where the chosen, and where the rejected response is there, else 0, (B,) each; None: all are. Of one
    that is missing z and ref are 0 and |y| is 1."""
    likely: Tensor | None = None
    """Log-probability of the text beside the chosen response that a likelihood term is of, summed over its
    tokens, (B,): the prompt, a gold response, or the chosen one by itself (`Reading.sft_of`). None where
    there is none."""
    likely_tokens: Tensor | None = None
    """Tokens of that text, (B,)."""
    lists: Lists | None = None
    """Which pairs make a list, for a listwise loss; None: each pair is a list of two."""

    @property
    def r_w(self) -> Tensor:
        """z_w - ref_w, (B,)."""
        return self.z_w - self.ref_w

    @property
    def r_l(self) -> Tensor:
        """z_l - ref_l, (B,)."""
        return self.z_l - self.ref_l

    @property
    def u_w(self) -> Tensor:
        """What stands for r_w under the reading's divergence: r_w itself for the reverse KL, (B,)."""
        return self.reading.of_ratio(self.r_w)

    @property
    def u_l(self) -> Tensor:
        """Likewise for r_l, (B,)."""
        return self.reading.of_ratio(self.r_l)

    def margin(self) -> Tensor:
        """mt = r_w - r_l, the implicit reward margin divided by beta, (B,); under another divergence than the
        reverse KL u_w - u_l."""
        return self.u_w - self.u_l

    def sigmoid_loss(self, logit: Tensor) -> Tensor:
        """-log sigmoid(logit), (B,), with the reading's label smoothing."""
        return self.reading.sigmoid_loss(logit)

    def add_sides(self, of_chosen: Tensor, *of_rejected: Tensor) -> Tensor:
        """The sum of a loss of the chosen response alone and of losses of the rejected one alone, (B,), of
        those that are there. A loss that is such a sum takes single answers with a label too."""
        if self.present is None:
            return sum(of_rejected, start=of_chosen)
        has_w, has_l = self.present
        return sum((has_l * loss for loss in of_rejected), start=has_w * of_chosen)

    def likelihood_loss(self, weight: float = 1.0, mean: str = "pairs") -> Tensor:
        """-weight z_w of the chosen responses, (B,). pairs: over |y_w|. sum: summed. tokens: over the global
        batch's mean of |y_w|, so that its mean over pairs is that over the batch's tokens. The reading's
        sft_mean wins over `mean`, which is what the formula has."""
        if self.present is not None:
            whole = self._replace(present=None).likelihood_loss(weight, mean)
            return self.present[0] * whole
        wanted = self.reading.sft_mean
        if self.reading.sft_of == "response":
            if (wanted or mean) == "pairs":
                return -(weight * self.z_w) / self.len_w
            if wanted is None:
                return -(weight * self.z_w)
        tokens = self.len_w if self.tokens is None else self.tokens[0]
        total = -(weight * self.z_w) if self.tokens is None else -(weight * self.z_w) * tokens
        if self.reading.sft_of != "response":
            if self.likely is None or self.likely_tokens is None:
                raise ValueError(f"sft_of={self.reading.sft_of} needs the log-probs of that text")
            if self.reading.sft_is_beside:
                total, tokens = -(weight * self.likely), self.likely_tokens
            else:
                total, tokens = total - weight * self.likely, tokens + self.likely_tokens
            if (wanted or mean) == "pairs":
                return total / tokens
        if (wanted or mean) == "sum":
            return total
        return total / (tokens.mean() if self.mean_tokens is None else self.mean_tokens)

    def as_lists(self) -> Lists:
        """The lists; of pairs those of two responses, with scores 1 and 0."""
        if self.lists is not None:
            return self.lists
        order = torch.arange(2, device=self.z_w.device).expand(len(self.z_w), 2)
        return Lists(order, torch.ones_like(order, dtype=torch.bool), (1 - order).to(self.z_w.dtype))

    def of_lists(self, values: Tensor) -> Tensor:
        """A number of each list (L,) for each of its pairs (B,): a listwise loss gives every pair its list's,
        so that the mean over pairs is that over lists, and so are its derivatives."""
        return values.repeat_interleave(len(self.z_w) // len(values))

    def extra_tokens(self) -> Tensor:
        """Tokens of the chosen response less those of the rejected one, (B,), whatever z is: for a loss that
        is about the lengths themselves."""
        chosen, rejected = (self.len_w, self.len_l) if self.tokens is None else self.tokens
        return chosen - rejected

    def averaged(self) -> "PairLogProbs":
        """z and ref as means over tokens, and |y| = 1, so that nothing is divided twice; itself where they
        are."""
        if self.tokens is not None:
            return self
        return self._replace(
            z_w=self.z_w / self.len_w,
            z_l=self.z_l / self.len_l,
            ref_w=self.ref_w / self.len_w,
            ref_l=self.ref_l / self.len_l,
            len_w=torch.ones_like(self.len_w),
            len_l=torch.ones_like(self.len_l),
            tokens=(self.len_w, self.len_l),
        )


LossFunction = Callable[[PairLogProbs, Any], Tensor]
Match = Callable[[PairLogProbs], tuple[Tensor, Tensor]]
"""From all pairs of a global batch to the numbers that their two sides are compared with, (B,) each."""


@dataclass(frozen=True)
class BatchStatistic:
    """Detached numbers that a loss reads from `PairLogProbs.state`, learnt from a global batch: from the
    pairs of the step before, or from the lengths or the mismatched pairs of the step itself.

    Either way they are known before the step's first micro-batch, so that the loss does not depend on how the
    batch is split over ranks and micro-batches.
    """

    column: Callable[[PairLogProbs], Tensor]
    """One number per pair (B,), whose mean over the global batch is what the state learns from."""
    start: Callable[[float], tuple[float, ...]]
    """State before the first step, from the mean of |y_w| + |y_l| over the first global batch."""
    advance: Callable[[tuple[float, ...], float], tuple[float, ...]]
    """Next state from the state and the global batch's mean of `column`."""
    of_mismatched: bool = False
    """Whether `column` is of mismatched pairs (`rcpo.data.mismatched`): each prompt of the step's own batch
    with another pair's responses, scored without gradients before the step. Costs a forward pass of policy
    and reference."""
    of_lengths: bool = False
    """Whether `column` reads len_w and len_l alone, of the step's own pairs: these are known before it."""

    def is_of(self, mismatched: bool, lengths: bool) -> bool:
        return (self.of_mismatched, self.of_lengths) == (mismatched, lengths)

    @property
    def width(self) -> int:
        """How many numbers of the state are this statistic's."""
        return len(self.start(1.0))


@dataclass(frozen=True)
class Objective:
    """A registered loss with its parameters: call it with `PairLogProbs`, get the loss per pair (B,)."""

    name: str
    loss: LossFunction
    config: Any
    needs_reference: bool
    """Whether ref_w and ref_l enter the loss; where they do not, they are read for the metrics only."""
    statistics: tuple[BatchStatistic, ...] = ()
    """Batch statistics, in the order of their numbers in the state; most objectives have none."""
    weighs_tokens: bool = False
    """Whether z and r are sums over tokens weighted by importance
    (`rcpo.models.logprobs.importance_weighted`)."""
    averages: bool = False
    """Whether the loss reads log-probs averaged over tokens, whatever its formula says of z
    (objective.log_probs=mean)."""
    reading: Reading = AS_WRITTEN
    """Switches that formulas share, as this one is read."""
    ld_alpha: float = 1.0
    """What a response's tokens past the length of the shorter one count in z and ref; 1: as the others do."""
    wpo: bool = False
    """Whether each pair's loss is times how likely its responses are to the policy, WPO's weight."""
    spread_lambda: float | None = None
    """lambda of the exponents of a pair or list, one for the weight of each of its responses; None: it has
    one weight."""
    listwise: bool = False
    """Whether the loss is of a list of responses (`PairLogProbs.lists`), of which a pair is the shortest."""
    match: Match | None = None
    """For a loss that compares ranks within the global batch: what a step asks of all its pairs before it
    begins. A pair's derivatives are those of the batch's loss; its own loss is its share of that."""

    def view(self, pair: PairLogProbs) -> PairLogProbs:
        """The pair as the loss reads it, which incentives are derivatives by: as it is, or averaged, with the
        objective's reading. A term of a mix keeps the reading of the whole."""
        if self.averages:
            pair = pair.averaged()
        if self.reading == AS_WRITTEN:
            return pair
        ref_w, ref_l = self.reading.references(pair.ref_w, pair.ref_l)
        return pair._replace(ref_w=ref_w, ref_l=ref_l, reading=self.reading)

    def __call__(self, pair: PairLogProbs) -> Tensor:
        pair = self.view(pair)
        if self.statistics and not pair.state:
            pair = pair._replace(state=self.initial_state(float((pair.len_w + pair.len_l).mean())))
        if self.match is not None and pair.partners is None:
            pair = pair._replace(partners=self.partners_of(pair))
        return self.loss(pair, self.config)

    def partners_of(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """What the sides of these pairs, all of a global batch, are compared with; (B,) each, detached."""
        if self.match is None:
            raise ValueError(f"{self.name} compares no ranks")
        partner_w, partner_l = self.match(self.view(pairs))
        return partner_w.detach(), partner_l.detach()

    def params(self) -> dict[str, Any]:
        """The parameters as a plain dict, with the keys of the YAML file."""
        return {config_key(name): value for name, value in dataclasses.asdict(self.config).items()}

    @property
    def needs_mismatched(self) -> bool:
        """Whether a step must score mismatched pairs before it begins."""
        return any(statistic.of_mismatched for statistic in self.statistics)

    @property
    def needs_lengths(self) -> bool:
        """Whether a step must know its global batch's lengths before it begins."""
        return any(statistic.of_lengths for statistic in self.statistics)

    @property
    def reads_tokens(self) -> bool:
        """Whether the loss needs more of a response's token log-probs than their sum: then an evaluation,
        which has sums, has no loss."""
        is_plain = self.ld_alpha == 1 and self.reading.sft_of == "response"
        return self.weighs_tokens or self.wpo or not is_plain

    @property
    def needs_reference_tokens(self) -> bool:
        """Whether the reference's log-probs must be known token by token."""
        return self.weighs_tokens or (self.ld_alpha != 1 and self.needs_reference)

    @property
    def needs_mean_tokens(self) -> bool:
        """Whether a step must know the mean of the global batch's |y_w| before it begins."""
        return self.reading.sft_mean == "tokens"

    @property
    def num_statistics(self) -> int:
        """Columns of the batch's own pairs to average over the global batch once they have been through the
        model; 0 for most objectives."""
        return sum(statistic.is_of(False, False) for statistic in self.statistics)

    def statistic_columns(
        self, pair: PairLogProbs, of_mismatched: bool = False, of_lengths: bool = False
    ) -> Tensor:
        """The columns whose global-batch means `advance` wants: (n, B), detached; n is `num_statistics`, or
        the number of those that mismatched pairs, or lengths alone, have."""
        pair = self.view(pair)
        columns = [
            statistic.column(pair).detach()
            for statistic in self.statistics
            if statistic.is_of(of_mismatched, of_lengths)
        ]
        return torch.stack(columns) if columns else pair.z_w.new_zeros(0, len(pair.z_w))

    def initial_state(self, mean_total_length: float) -> tuple[float, ...]:
        """State before the first step; `mean_total_length` is the mean of |y_w| + |y_l| over the first global
        batch, in tokens."""
        length = 2.0 if self.averages else mean_total_length
        return tuple(number for statistic in self.statistics for number in statistic.start(length))

    def advance(
        self,
        state: tuple[float, ...],
        means: Sequence[float],
        of_mismatched: bool = False,
        of_lengths: bool = False,
    ) -> tuple[float, ...]:
        """The state after the global batch's means of `statistic_columns`; what these are not about stays.
        Once per optimizer step: of its own pairs after it, of mismatched ones and of lengths before it. A
        mean that is not finite gives numbers that are not, and so a loss that is not."""
        numbers: list[float] = []
        left = iter(means)
        for statistic in self.statistics:
            own = state[len(numbers) : len(numbers) + statistic.width]
            if not statistic.is_of(of_mismatched, of_lengths):
                numbers += own
                continue
            mean = next(left)
            numbers += statistic.advance(own, mean) if math.isfinite(mean) else [math.nan] * statistic.width
        return tuple(numbers)
