"""Reference log-probs in the batches of the run itself: in bf16 a pair's z depends on what goes through the
model beside it.

Every pair is scored in the micro-batch in which a run meets it first, laid out as the policy will have it, so
that r is 0 to the last bit while the weights are the initial ones. Later passes over the data have other
micro-batches; by then the weights have moved, and a pair is rounded anew in the same batch too. Called by
`rcpo.reference.maker`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcpo.config.schema import TrainConfig
from rcpo.data.batch import PairBatch
from rcpo.data.joint import lay_out
from rcpo.data.pairs import SideLogProbs, TokenizedPair
from rcpo.models.evaluation import LogProbModel
from rcpo.models.logprobs import sum_per_side
from rcpo.ranks.distributed import gather, rank, world_size
from rcpo.reference.cache import KEY_BYTES, pair_keys


class Visit(NamedTuple):
    """A micro-batch of a run, as the policy takes it."""

    indices: list[int]
    may_join: bool = True
    """Whether its rows may be joined."""
    apart: bool = False
    """Whether its sides go through the model one after the other."""


class Visited(NamedTuple):
    """A pair in the micro-batch of its first visit."""

    idx: int
    row: int
    visit: int
    keys: tuple[bytes, bytes]
    """Of both sides in that micro-batch: what the cache of the weights knows them by."""


class Scored(NamedTuple):
    """What a model says of a batch, on the CPU: z (B,) of each side, and per pair its tokens' log-probs."""

    z_w: Tensor
    z_l: Tensor
    chosen: list[Tensor]
    rejected: list[Tensor]


def scored(model: LogProbModel, batch: PairBatch, apart: bool) -> Scored:
    """z as the policy sums it up, sides together or one after the other. Collective at ZeRO 3."""

    def pass_over(part: PairBatch) -> tuple[Tensor, list[Tensor]]:
        token_logps = model.logprobs_without_grad(part, tokens=True)
        return sum_per_side(token_logps, part).cpu(), list(token_logps.cpu().split(part.lengths.tolist()))

    batch = batch.to(model.device)
    if apart:
        (z_w, chosen), (z_l, rejected) = (pass_over(batch.side(chosen=side)) for side in (True, False))
        return Scored(z_w, z_l, chosen, rejected)
    z, tokens = pass_over(batch)
    z_w, z_l = z.chunk(2)
    return Scored(z_w, z_l, tokens[: batch.num_pairs], tokens[batch.num_pairs :])


class Visits:
    """The first visits to all pairs of a run."""

    def __init__(
        self, visits: Iterable[Visit], train: Sequence[TokenizedPair], config: TrainConfig, pad_id: int
    ) -> None:
        self._train, self._config, self._pad_id = train, config, pad_id
        self._visits: list[Visit] = []
        self.by_pair: dict[int, Visited] = {}
        """By the pair's index, in the order of the visits."""
        for visit in visits:
            if not self.by_pair.keys() >= set(visit.indices):
                self._add(visit)

    def _add(self, visit: Visit) -> None:
        number, pairs = len(self._visits), [self._train[idx] for idx in visit.indices]
        self._visits.append(visit)
        kind = repr((visit.may_join, visit.apart, self._config.share_prefix, self._config.packing))
        whole = hashlib.blake2b(kind.encode(), digest_size=KEY_BYTES)
        for pair in pairs:
            whole.update(b"".join(pair_keys(pair)))

        def key(place: int, side: str) -> bytes:
            content = whole.digest() + f"{place} {side}".encode()
            return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()

        for place, (idx, pair) in enumerate(zip(visit.indices, pairs, strict=True)):
            self.by_pair.setdefault(idx, Visited(idx, pair.row, number, (key(place, "w"), key(place, "l"))))

    def z(
        self,
        model: LogProbModel,
        wanted: Sequence[Visited],
        on_batch: Callable[[int], None] = lambda num_pairs: None,
    ) -> SideLogProbs:
        """Of these pairs, in their order. Collective."""
        found: dict[int, tuple[float, float]] = {}
        for idx, place, scores in self._scores(model, {each.visit for each in wanted}, on_batch):
            found[idx] = float(scores.z_w[place]), float(scores.z_l[place])
        for others in gather(found):
            found |= others
        z = torch.tensor([found[each.idx] for each in wanted], dtype=torch.float32)
        return SideLogProbs(*z.view(-1, 2).unbind(1))

    def tokens(self, model: LogProbModel) -> dict[int, Tensor]:
        """Of all pairs the log-probs of the chosen and then the rejected tokens, on the CPU. Collective."""
        found: dict[int, Tensor] = {}
        for idx, place, scores in self._scores(model, set(range(len(self._visits)))):
            found[idx] = torch.cat([scores.chosen[place], scores.rejected[place]])
        for others in gather(found):
            found |= others
        return found

    def _scores(
        self,
        model: LogProbModel,
        numbers: set[int],
        on_batch: Callable[[int], None] = lambda num_pairs: None,
    ) -> Iterator[tuple[int, int, Scored]]:
        """This rank's share of these visits: the pairs that are met first there, with their places. All ranks
        run the same number of passes, because at ZeRO 3 one is a collective."""
        todo = sorted(numbers)
        for first in range(0, len(todo), world_size()):
            number = todo[min(first + rank(), len(todo) - 1)]
            visit = self._visits[number]
            pairs = [self._train[idx] for idx in visit.indices]
            batch = lay_out(self._config, pairs, self._pad_id, visit.may_join)
            scores = scored(model, batch, visit.apart)
            places = {idx: place for place, idx in reversed(list(enumerate(visit.indices)))}
            yield from (
                (idx, place, scores) for idx, place in places.items() if self.by_pair[idx].visit == number
            )
            on_batch(len(pairs) * min(world_size(), len(todo) - first))
