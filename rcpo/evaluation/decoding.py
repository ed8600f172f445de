"""From prompts as token ids to answers as token ids, by transformers' `generate` or by another engine
(`Writer`): greedy, or drawn with a seed for every answer.

An answer depends on its prompt and its seed alone. Rows of a batch are padded on the left, where attention
does not look, and positions are counted from a row's first real token, which `generate` does by the mask. In
fp32 the same prompt thus has the same answer whatever it is batched with; bf16 rounds differently in other
shapes. Does not render or decode text (`rcpo.evaluation.prompts`)."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rcpo.data.pictures import Pictures, pixels_of
from rcpo.models.attention import UNREAD_SDPA
from rcpo.models.vision import own_inputs

DEFAULT_NEW_TOKENS = 512


@dataclass(frozen=True)
class Decoding:
    """How an answer is written."""

    temperature: float = 0.0
    """0 is greedy: the likeliest token each time."""
    top_p: float = 1.0
    """Of the drawn tokens: the fewest that have this probability together, at temperature."""
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    answers_per_batch: int = 16


class Asked(NamedTuple):
    """A prompt to be answered."""

    ids: list[int]
    seed: str = ""
    """Of the draws; unread where decoding is greedy."""
    pictures: Pictures | None = None
    """The prompt's images, for whose tokens the ids have room."""


class Answer(NamedTuple):
    """What the model wrote."""

    ids: list[int]
    """Without the token that ended it."""
    is_finished: bool
    """Whether it ended with a token that ends an answer, and was not cut."""
    watched: tuple[float, ...] = ()
    """Log-probabilities of the watched tokens as its first one, fp32."""


class Task(NamedTuple):
    """An answer that is to be written."""

    place: int
    """Its number."""
    asked: Asked
    num_new: int
    """Tokens that it may have at most."""


class Writer(ABC):
    """An engine that batches by itself, in the place of a model of transformers."""

    @property
    @abstractmethod
    def positions(self) -> int | None:
        """Tokens that the model takes."""

    @abstractmethod
    def write(
        self, tasks: Sequence[Task], decoding: Decoding, stop_ids: Sequence[int], watched: Sequence[int]
    ) -> Iterator[dict[int, Answer]]:
        """Answers by their places, as `answer_all` gives them."""


def positions_of(model: PreTrainedModel | Writer) -> int | None:
    """Tokens that the model takes, where its config says it."""
    if isinstance(model, Writer):
        return model.positions
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def room(num_prompt: int, decoding: Decoding, positions: int | None) -> int:
    """New tokens that there may be behind a prompt."""
    return (
        decoding.max_new_tokens if positions is None else min(decoding.max_new_tokens, positions - num_prompt)
    )


@torch.inference_mode()
def answer_all(
    model: PreTrainedModel | Writer,
    asked: Sequence[Asked],
    decoding: Decoding,
    stop_ids: Sequence[int],
    pad_id: int,
    watched: Sequence[int] = (),
) -> Iterator[dict[int, Answer]]:
    """Answers by their place in `asked`, batch by batch, the longest prompts first; an empty one where a
    prompt leaves no room. `watched`: tokens whose log-probability as the first of an answer is told."""
    positions = positions_of(model)
    rooms = [room(len(each.ids), decoding, positions) for each in asked]
    full = [place for place, tokens in enumerate(rooms) if tokens < 1]
    if full:
        yield {place: Answer([], False) for place in full}
    waiting = [place for place, tokens in enumerate(rooms) if tokens >= 1]
    waiting.sort(key=lambda place: (rooms[place], -len(asked[place].ids), asked[place].ids))
    if isinstance(model, Writer):
        tasks = [Task(place, asked[place], rooms[place]) for place in waiting]
        yield from model.write(tasks, decoding, stop_ids, watched)
        return
    see_masks(model)
    while waiting:
        tokens = rooms[waiting[0]]
        members = [place for place in waiting[: decoding.answers_per_batch] if rooms[place] == tokens]
        waiting = waiting[len(members) :]
        batch = [asked[place] for place in members]
        found = _answer_batch(model, batch, tokens, decoding, stop_ids, pad_id, watched)
        yield dict(zip(members, found, strict=True))


def see_masks(model: PreTrainedModel) -> None:
    """Let attention look at masks again, which training has no need of: here rows are padded on the left."""
    if model.config._attn_implementation == UNREAD_SDPA:
        model.set_attn_implementation("sdpa")


def _answer_batch(
    model: PreTrainedModel,
    asked: Sequence[Asked],
    num_new: int,
    decoding: Decoding,
    stop_ids: Sequence[int],
    pad_id: int,
    watched: Sequence[int],
) -> list[Answer]:
    longest = max(len(each.ids) for each in asked)
    ids = torch.full((len(asked), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, each in enumerate(asked):
        ids[row, longest - len(each.ids) :] = torch.tensor(each.ids)
        mask[row, longest - len(each.ids) :] = 1
    first = FirstToken(watched)
    processors: list[Callable[[Tensor, Tensor], Tensor]] = [first] if watched else []
    if decoding.temperature > 0:
        processors.append(Draws([each.seed for each in asked], decoding.temperature, decoding.top_p))
    pixels = pixels_of(asked)
    ids = ids.to(model.device)
    # A config of its own: the folder's may ask for sampling, penalties or other lengths.
    model.generation_config = GenerationConfig(pad_token_id=pad_id, eos_token_id=list(stop_ids) or None)
    written = model.generate(
        input_ids=ids,
        attention_mask=mask.to(model.device),
        **own_inputs(model, ids, None if pixels is None else pixels.to(model.device).of_side()),
        max_new_tokens=num_new,
        logits_processor=LogitsProcessorList(processors),
    )
    answers = [up_to_stop(row, set(stop_ids)) for row in written[:, longest:].tolist()]
    rows = [()] * len(answers) if first.found is None else map(tuple, first.found.tolist())
    return [answer._replace(watched=row) for answer, row in zip(answers, rows, strict=True)]


def up_to_stop(ids: list[int], stop_ids: set[int]) -> Answer:
    """Without the token that ended it, and what is behind that."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    return Answer(ids, False) if end is None else Answer(ids[:end], True)


class FirstToken(LogitsProcessor):
    """Keeps the log-probabilities of some tokens as the first of each row's answer, and changes nothing."""

    def __init__(self, watched: Sequence[int]) -> None:
        self._watched = list(watched)
        self.found: Tensor | None = None
        """(rows, tokens) fp32, once an answer has begun."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.found is None:
            self.found = scores.float().log_softmax(-1)[:, self._watched]
        return scores


class Draws(LogitsProcessor):
    """Draws each row's next token from softmax(logits / temperature), cut to top_p, by one uniform number of
    the row's own generator; the drawn token alone is left for the greedy search behind it."""

    def __init__(self, seeds: Sequence[str], temperature: float, top_p: float) -> None:
        self._draws = [random.Random(seed) for seed in seeds]
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = (scores.double() / self._temperature).softmax(-1)
        if self._top_p < 1:
            probabilities = _top(probabilities, self._top_p)
        upto = probabilities.cumsum(-1)
        points = torch.tensor([draw.random() for draw in self._draws], dtype=upto.dtype, device=upto.device)
        below = upto <= points[:, None] * upto[:, -1:]
        drawn = torch.minimum(below.sum(-1), (upto < upto[:, -1:]).sum(-1))  # rounding may reach the last sum
        left = torch.full_like(scores, -torch.inf)
        return left.scatter_(1, drawn[:, None], 0.0)


def _top(probabilities: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that have `top_p` together, and zeros; of equal ones the lower id first."""
    values, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    return torch.zeros_like(probabilities).scatter_(1, order, values.masked_fill(before >= top_p, 0.0))
