"""The oracle of calibration=published: its recursion as the formulas say it, one rank and one micro-batch
after the other, in plain torch.

Full logits, one pair after another, losses and incentives of averaged log-probs by hand. Takes nothing of
rcpo but tokenised pairs.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.plain_loop import Geometry, Sides, geometry_of, head_geometry, summed
from rcpo.data.tokenize import TokenizedPair

Batch = list[TokenizedPair]
BETA, LAMBDA = 0.1, 1.0


@dataclass
class PublishedRun:
    alphas: list[list[list[float]]] = field(default_factory=list)
    """By step, rank and micro-batch."""
    emas: list[list[tuple[float, float]]] = field(default_factory=list)
    """By step and rank: of log r and log r*, after the step."""


def train_published(
    model: PreTrainedModel,
    steps: Sequence[Sequence[Sequence[Batch]]],
    objective: str,
    optimizer: torch.optim.Optimizer,
    grad_clip: float,
    ema_beta: float,
    adapters: Callable[[PreTrainedModel], list[nn.Parameter]] | None = None,
) -> PublishedRun:
    """Train `model` in place on `steps`, each a list of micro-batches for every rank. Scores are of the
    output projection, or of what `adapters` gives."""
    start = copy.deepcopy(model)
    num_ranks = len(steps[0])
    log_r: list[float | None] = [None] * num_ranks
    log_r_star: list[float | None] = [None] * num_ranks
    run = PublishedRun()
    for of_ranks in steps:
        optimizer.zero_grad()
        alphas: list[list[float]] = []
        for rank, micro_batches in enumerate(of_ranks):
            alphas.append([])
            for batch in micro_batches:
                z = summed(model, batch)
                with torch.no_grad():
                    ref = summed(start, batch)
                len_w, len_l = _lengths(batch)
                mean_w, mean_l = z.z_w / len_w, z.z_l / len_l
                r_w, r_l = mean_w.detach() - ref.z_w / len_w, mean_l.detach() - ref.z_l / len_l
                d_w, d_l = _incentives(objective, mean_w.detach(), mean_l.detach(), r_w, r_l)
                geometry = _geometry(model, batch, z, Sides(1 / len_w, 1 / len_l), adapters)
                log_r[rank] = _ema(log_r[rank], math.log(d_w.mean() / d_l.mean()), ema_beta)
                ratio = geometry.rejected_norm / geometry.chosen_norm
                log_r_star[rank] = _ema(log_r_star[rank], math.log(ratio), ema_beta)
                alpha = math.exp(0.5 * (log_r_star[rank] - log_r[rank]))  # type: ignore[operator]
                loss = (-alpha * d_w * mean_w + d_l / alpha * mean_l).mean()
                (loss / len(micro_batches) / num_ranks).backward()
                alphas[rank].append(alpha)
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        run.alphas.append(alphas)
        run.emas.append(list(zip(log_r, log_r_star, strict=True)))  # type: ignore[arg-type]
    return run


def _ema(before: float | None, value: float, beta: float) -> float:
    return value if before is None else beta * before + (1 - beta) * value


def _lengths(batch: Batch) -> tuple[Tensor, Tensor]:
    sides = [pair.chosen for pair in batch], [pair.rejected for pair in batch]
    of_w, of_l = (
        torch.tensor([float(len(one.input_ids) - one.num_prompt) for one in side]) for side in sides
    )
    return of_w, of_l


def _incentives(
    objective: str, mean_w: Tensor, mean_l: Tensor, r_w: Tensor, r_l: Tensor
) -> tuple[Tensor, Tensor]:
    """-dL/d mean_w and +dL/d mean_l of L = -log s(beta (r_w - r_l)), or -log s(beta (z_w - z_l)) - lambda
    z_w, or -log s(r_w) - log s(-r_l), all of averages."""
    if objective == "dpo":
        pull = BETA * torch.sigmoid(-BETA * (r_w - r_l))
        return pull, pull
    if objective == "dil_bce":
        return torch.sigmoid(-r_w), torch.sigmoid(r_l)
    assert objective == "cpo"
    pull = BETA * torch.sigmoid(-BETA * (mean_w - mean_l))
    return pull + LAMBDA, pull


def _geometry(
    model: PreTrainedModel,
    batch: Batch,
    z: Sides,
    shares: Sides,
    adapters: Callable[[PreTrainedModel], list[nn.Parameter]] | None,
) -> Geometry:
    """Of the means of z/|y|."""
    if adapters is None:
        return head_geometry(model, batch, shares)
    return geometry_of(z, shares, adapters(model))
