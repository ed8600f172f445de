"""Lists of responses for tests: random ones as slots, and the method on them once more in plain torch."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.tiny_models import VOCABULARY
from rcpo.data.lists import listed, pairs_of_list
from rcpo.data.packer import pack
from rcpo.data.pairs import PackedPairs, TokenizedSide
from rcpo.records.record import PreferenceRecord


@dataclass(frozen=True)
class PlainList:
    """One prompt's responses, the best first."""

    sides: list[TokenizedSide]
    scores: list[float]


def make_lists(lengths: Sequence[int], *, seed: int = 0, ties: bool = False) -> list[PlainList]:
    """Random lists of so many responses each; with `ties` some are scored alike."""
    draw, made = random.Random(seed), []
    for num in lengths:
        prompt = [1, *(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(0, 3)))]
        sides = [
            TokenizedSide(
                [*prompt, *(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 6)))], len(prompt)
            )
            for _ in range(num)
        ]
        scores = sorted((draw.randint(0, 2 if ties else 99) / 2 for _ in range(num)), reverse=True)
        scores[0] += 1
        made.append(PlainList(sides, scores))
    return made


def slots_of(lists: Sequence[PlainList]) -> PackedPairs:
    """As training data has them with data.lists=whole."""
    pairs, places = [], []
    for row, each in enumerate(lists):
        record = PreferenceRecord("", "", "", row, scores=tuple(each.scores))
        own = pairs_of_list(each.sides, record, "whole")
        places.append(range(len(pairs), len(pairs) + len(own)))
        pairs += own
    return listed(pack(pairs), places)


def z_of(model: PreTrainedModel, side: TokenizedSide) -> Tensor:
    """The sum of a response's log-probs, its row alone."""
    ids = torch.tensor([side.input_ids])
    logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(1)
    return logps.gather(1, ids[0, 1:, None])[side.num_prompt - 1 :].sum()


Loss = Callable[[Tensor, Tensor, Tensor, Sequence[float]], Tensor]
"""Of one list: from z, the reference's z and |y| (n,), and the scores, to the loss."""


def pl_dpo_loss(z: Tensor, ref: Tensor, length: Tensor, scores: Sequence[float]) -> Tensor:
    """Of scores without a tie, at beta 0.1."""
    x = 0.1 * (z - ref)
    return -sum((x[k] - x[k:].logsumexp(0) for k in range(len(x))), start=torch.zeros(()))


def lire_loss(z: Tensor, ref: Tensor, length: Tensor, scores: Sequence[float]) -> Tensor:
    return -(z.softmax(0) * torch.tensor(scores)).sum()


def rrhf_loss(z: Tensor, ref: Tensor, length: Tensor, scores: Sequence[float]) -> Tensor:
    p, total = z / length, -(z / length)[0]
    for i, better in enumerate(scores):
        for j, worse in enumerate(scores):
            if better > worse:
                total = total + torch.relu(p[j] - p[i])
    return total


@dataclass(frozen=True)
class PlainStep:
    loss: float
    up: list[Tensor]
    """sum_{d_i > 0} d_i grad z_i, mean over lists, by parameter."""
    down: list[Tensor]
    """sum_{d_i < 0} |d_i| grad z_i."""
    head_up: Tensor
    """sum grad z_i of the same responses by the head's weight, mean over lists."""
    head_down: Tensor
    mean_up: float
    """Mean of d_i > 0, over responses; of the upper half's d_i = 0 too."""
    mean_down: float


def plain_step(
    model: PreTrainedModel, reference: PreTrainedModel, lists: Sequence[PlainList], loss_of: Loss
) -> PlainStep:
    """The two sides of the gradient, response by response."""
    parameters = list(model.parameters())
    up, down = ([torch.zeros_like(each) for each in parameters] for _ in range(2))
    head = [id(each) for each in parameters].index(id(model.get_output_embeddings().weight))
    of_head = [torch.zeros_like(parameters[head]) for _ in range(2)]
    pulls: tuple[list[float], list[float]] = ([], [])
    total = 0.0
    for each in lists:
        z = torch.stack([z_of(model, side) for side in each.sides])
        with torch.no_grad():
            ref = torch.stack([z_of(reference, side) for side in each.sides])
        length = torch.tensor([float(side.num_tokens - side.num_prompt) for side in each.sides])
        leaf = z.detach().requires_grad_()
        loss = loss_of(leaf, ref, length, each.scores)
        total += loss.item() / len(lists)
        (gradient,) = torch.autograd.grad(loss, leaf)
        for rank, (d, one) in enumerate(zip(-gradient, z, strict=True)):
            of_upper_half = rank < len(z) - len(z) // 2  # decides where d is 0
            score = torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True)
            for which, (side, sign) in enumerate(((up, 1.0), (down, -1.0))):
                if sign * d > 0 or (d == 0 and of_upper_half == (which == 0)):
                    pulls[which].append(float(sign * d))
                    of_head[which] += score[head] / len(lists)
                    for part, own in zip(side, score, strict=True):
                        part += 0.0 if own is None else sign * d / len(lists) * own
    means = [sum(of_side) / len(of_side) for of_side in pulls]
    return PlainStep(total, up, down, of_head[0], of_head[1], means[0], means[1])


def norm_of(parts: Sequence[Tensor]) -> float:
    return float(torch.cat([part.flatten().double() for part in parts]).norm())
