"""Reference log-probs in the batches of the run itself: in bf16 a pair's z depends on what goes through the
model beside it.

Every pair is scored in the micro-batch in which a run meets it first, laid out as the policy will have it, so
that r is 0 to the last bit while the weights are the initial ones. Later passes over the data have other
micro-batches; by then the weights have moved, and a pair is rounded anew in the same batch too. Called by
`rcpo.reference.maker`.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcpo.config.schema import TrainConfig
from rcpo.data.batch import PairBatch
from rcpo.data.joint import lay_out
from rcpo.data.pairs import TokenizedPair
from rcpo.models.evaluation import LogProbModel
from rcpo.models.logprobs import sum_per_side
from rcpo.ranks.distributed import gather, rank, world_size
from rcpo.reference.cache import place_keys


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
        for idx, pair, keys in zip(visit.indices, pairs, place_keys(kind, pairs), strict=True):
            self.by_pair.setdefault(idx, Visited(idx, pair.row, number, keys))

    def passes(self, model: LogProbModel, wanted: Sequence[Visited]) -> "VisitPasses":
        """How these pairs go through the model."""
        return VisitPasses(self, model, wanted)

    def scores_of(self, model: LogProbModel, number: int) -> tuple[dict[int, int], Scored]:
        """Of one visit, and by pair its place there. Collective at ZeRO 3."""
        visit = self._visits[number]
        pairs = [self._train[idx] for idx in visit.indices]
        batch = lay_out(self._config, pairs, self._pad_id, visit.may_join)
        places = {idx: place for place, idx in reversed(list(enumerate(visit.indices)))}
        return places, scored(model, batch, visit.apart)

    def tokens(self, model: LogProbModel) -> dict[int, Tensor]:
        """Of all pairs the log-probs of the chosen and then the rejected tokens, on the CPU. Collective."""
        found: dict[int, Tensor] = {}
        for first in range(0, len(self._visits), world_size()):
            number = min(first + rank(), len(self._visits) - 1)
            places, scores = self.scores_of(model, number)
            for idx, place in places.items():
                if self.by_pair[idx].visit == number:
                    found[idx] = torch.cat([scores.chosen[place], scores.rejected[place]])
        for others in gather(found):
            found |= others
        return found


class VisitPasses:
    """As `rcpo.reference.parts.Passes` says: a visit is a pass."""

    def __init__(self, visits: Visits, model: LogProbModel, wanted: Sequence[Visited]) -> None:
        self._visits, self._model, self._wanted = visits, model, wanted
        by_visit: dict[int, list[int]] = {}
        for at, each in enumerate(wanted):
            by_visit.setdefault(each.visit, []).append(at)
        self._numbers = sorted(by_visit)
        self.members: list[list[int]] = [by_visit[number] for number in self._numbers]

    def places(self, number: int) -> list[tuple[bytes, bytes]]:
        return [self._wanted[at].keys for at in self.members[number]]

    def z(self, number: int) -> Tensor:
        places, scores = self._visits.scores_of(self._model, self._numbers[number])
        at = [places[self._wanted[each].idx] for each in self.members[number]]
        return torch.stack([scores.z_w[at], scores.z_l[at]])
