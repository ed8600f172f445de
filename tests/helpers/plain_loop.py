"""The oracle of the engine tests: training as the formulas of the method say it, in plain torch.

Full logits, log-softmax, one pair after another, no padding, no micro-batches, no ranks; losses and
incentives written out by hand. Takes nothing of rcpo but tokenised pairs. `rows` has the names of
metrics.jsonl.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.plain_balance import PlainBalance
from rcpo.data.tokenize import TokenizedPair, TokenizedSide

DPO_BETA, SIMPO_BETA, SIMPO_GAMMA, IPO_TAU, KTO_BETA = 0.1, 2.0, 1.0, 0.1, 0.1
MAX_LOG_ALPHA = 3.0


@dataclass(frozen=True)
class Steering:
    """What feedback goes by."""

    gain: float
    integral_gain: float
    smoothing: float
    low: float
    high: float
    every: int
    """Optimizer steps between measurements on the probe; 1 on the batch."""
    num_fresh_steps: int
    """Steps at the start that measure on the batch."""


@dataclass(frozen=True)
class Settings:
    """One plain run."""

    objective: str
    """dpo, simpo, ipo, or kto with kl=mismatched."""
    calibration: str
    """off, fixed, feedback, balance, or one that centres the band: on, exact."""
    optimizer: str
    """sgd or adamw (eps 1e-4)."""
    lr: float
    grad_clip: float
    scope: str = "head"
    """head or full."""
    estimator: str = "mean"
    """mean or weighted."""
    every: int = 1
    """Optimizer steps between measurements."""
    warmup_steps: int = 0
    """Optimizer steps at the start that are all measured."""
    ema_beta: float = 0.98
    dro_lambda: float | None = None
    """lambda of KL-DRO; None: the mean of the losses."""
    alpha: float = 1.0
    """Of fixed."""
    steering: Steering | None = None
    """Of feedback."""
    balance_every: int | None = None
    """Of balance: optimizer steps between measurements on the probe."""
    max_length: int = 1024
    """Tokens that a mismatched pair's side is cut to."""


@dataclass
class PlainRun:
    weights: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    reference_points: list[float] = field(default_factory=list)
    """kto's z0 of every step."""


class Sides(NamedTuple):
    """One number a pair (B,), attached to the graph where the model trains."""

    z_w: Tensor
    z_l: Tensor


class Geometry(NamedTuple):
    chosen_norm: float
    rejected_norm: float
    cosine: float


def train_plainly(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    batches: list[list[int]],
    settings: Settings,
    probe: Sequence[TokenizedPair] = (),
    reference: PreTrainedModel | None = None,
) -> PlainRun:
    """Train `model` in place, one optimizer step a batch of indices into `pairs`; `probe`, where feedback
    asks for it, is measured before the step. `reference` stands in for what `model` was at its start."""
    start = copy.deepcopy(model)
    reference = reference or start
    optimizer = _optimizer(model, settings)
    run = PlainRun()
    log_ratios, centers = _Ema(settings.ema_beta), _Ema(settings.ema_beta)
    last_measured = -1
    loop = None if settings.steering is None else _Loop(settings.steering)
    balance = None
    if settings.balance_every is not None:
        balance = PlainBalance(0.9 if settings.optimizer == "adamw" else 0.0, limit=2.0)
    for step, indices in enumerate(batches):
        batch = [pairs[idx] for idx in indices]
        with torch.no_grad():
            ref = summed(reference, batch)
        z0 = 0.0
        if settings.objective == "kto":
            z0 = max(0.0, sum(_mean_r(model, reference, mismatched(batch, settings.max_length))) / 2)
            run.reference_points.append(z0)
        steered = loop or balance
        log_alpha = 0.5 * (centers.value - log_ratios.value) if steered is None else steered.log_alpha
        alpha = settings.alpha * math.exp(max(-MAX_LOG_ALPHA, min(MAX_LOG_ALPHA, log_alpha)))
        z = summed(model, batch)
        leaves = Sides(z.z_w.detach(), z.z_l.detach())
        loss, d_w, d_l = loss_and_incentives(settings.objective, leaves, ref, batch, z0)
        weight = torch.tensor([pair.weight for pair in batch])
        loss, factor = aggregated(weight * loss, settings.dro_lambda)
        d_w, d_l = factor * weight * d_w, factor * weight * d_l
        # d loss / d theta = -d_w dz_w/dtheta + d_l dz_l/dtheta, with the two sides scaled.
        optimizer.zero_grad()
        (-alpha * d_w * z.z_w + d_l / alpha * z.z_l).mean().backward()
        row = {
            "train/loss": float(loss),
            "logps/chosen": float(leaves.z_w.mean()),
            "logps/rejected": float(leaves.z_l.mean()),
            "displacement/chosen": float((leaves.z_w - ref.z_w).mean()),
            "displacement/rejected": float((leaves.z_l - ref.z_l).mean()),
            "incentive/chosen": float(d_w.mean()),
            "incentive/rejected": float(d_l.mean()),
            "calibration/alpha": alpha,
        }
        if loop is not None and settings.steering is not None:
            if step < settings.steering.num_fresh_steps:
                loop.see(row["displacement/chosen"], 1)
            elif step % settings.steering.every == 0:
                loop.see(_mean_r(model, start, probe)[0], settings.steering.every)
        if balance is not None and settings.balance_every is not None:
            every = settings.balance_every
            is_measured = step == 1 or (step > 0 and step % (min(every, 2) if step < 30 else every) == 0)
            balance.step(sum(_mean_r(model, start, probe)) / 2 if is_measured else None)
        is_due = step < settings.warmup_steps or step % settings.every == 0
        if settings.calibration in ("on", "exact") and is_due:
            weighted = settings.estimator == "weighted"
            weights = Sides(d_w, d_l) if weighted else Sides(torch.ones_like(d_w), torch.ones_like(d_l))
            measure = head_geometry if settings.scope == "head" else full_geometry
            geometry = measure(model, batch, weights)
            row |= {f"score/{name}": value for name, value in geometry._asdict().items()}
            if d_w.mean() > 0 and d_l.mean() > 0:
                log_norms = math.log(geometry.rejected_norm / geometry.chosen_norm)
                position = -log_norms if weighted else math.log(d_w.mean() / d_l.mean())
                log_ratios.add(position, step - last_measured)
                centers.add(0.0 if weighted else log_norms, step - last_measured)
            last_measured = step
        limit = settings.grad_clip or math.inf
        row["train/grad_norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
        optimizer.step()
        run.rows.append(row)
    run.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return run


class _Ema:
    """A running mean of n values; k steps after the last one it keeps at most ema_beta^k: beta =
    min(ema_beta^k, n/(n+1))."""

    def __init__(self, ema_beta: float) -> None:
        self.value, self._num, self._ema_beta = 0.0, 0, ema_beta

    def add(self, value: float, num_steps: int) -> None:
        beta = min(self._ema_beta**num_steps, self._num / (self._num + 1))
        self.value = beta * self.value + (1 - beta) * value
        self._num += 1


class _Loop:
    """e <- s^k e + (1 - s^k) r, integral <- [integral - g_i k e], log alpha = [integral - g e], where []
    limits to low .. high; r is far from 5 nats here."""

    def __init__(self, steering: Steering) -> None:
        self._steering = steering
        self._error = self._integral = self.log_alpha = 0.0

    def see(self, mean_r_w: float, num_steps: int) -> None:
        steering = self._steering
        assert abs(mean_r_w) < 5
        kept = steering.smoothing**num_steps
        self._error = kept * self._error + (1 - kept) * mean_r_w
        moved = self._integral - steering.integral_gain * num_steps * self._error
        self._integral = min(max(moved, steering.low), steering.high)
        wanted = self._integral - steering.gain * self._error
        self.log_alpha = min(max(wanted, steering.low), steering.high)


def _mean_r(
    model: PreTrainedModel, start: PreTrainedModel, pairs: Sequence[TokenizedPair]
) -> tuple[float, float]:
    """Means of r_w and r_l."""
    with torch.no_grad():
        now, then = summed(model, list(pairs)), summed(start, list(pairs))
    return float((now.z_w - then.z_w).mean()), float((now.z_l - then.z_l).mean())


def _optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=settings.lr)
    return torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.999), eps=1e-4, weight_decay=0)


def mismatched(batch: Sequence[TokenizedPair], max_length: int) -> list[TokenizedPair]:
    """Prompt i with the responses of pair i + 1, the last with the first one's."""
    made = []
    for idx, pair in enumerate(batch):
        after = batch[(idx + 1) % len(batch)]
        sides = [
            TokenizedSide(
                (own.input_ids[: own.num_prompt] + other.input_ids[other.num_prompt :])[:max_length],
                own.num_prompt,
            )
            for own, other in ((pair.chosen, after.chosen), (pair.rejected, after.rejected))
        ]
        made.append(TokenizedPair(*sides, row=pair.row))
    return made


def loss_and_incentives(
    objective: str, z: Sides, ref: Sides, batch: list[TokenizedPair], z0: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, d_w = -dL/dz_w, d_l = +dL/dz_l, each (B,), differentiated by hand; `z0` is kto's."""
    len_w = torch.tensor([float(_num_response(pair.chosen)) for pair in batch])
    len_l = torch.tensor([float(_num_response(pair.rejected)) for pair in batch])
    r_w, r_l = z.z_w - ref.z_w, z.z_l - ref.z_l
    if objective == "dpo":
        margin = DPO_BETA * (r_w - r_l)
        pull = DPO_BETA * torch.sigmoid(-margin)
        return -torch.log(torch.sigmoid(margin)), pull, pull
    if objective == "simpo":
        margin = SIMPO_BETA * (z.z_w / len_w - z.z_l / len_l) - SIMPO_GAMMA
        pull = SIMPO_BETA * torch.sigmoid(-margin)
        return -torch.log(torch.sigmoid(margin)), pull / len_w, pull / len_l
    if objective == "kto":
        of_w, of_l = torch.sigmoid(KTO_BETA * (r_w - z0)), torch.sigmoid(KTO_BETA * (z0 - r_l))
        return (1 - of_w) + (1 - of_l), KTO_BETA * of_w * (1 - of_w), KTO_BETA * of_l * (1 - of_l)
    assert objective == "ipo"
    excess = r_w / len_w - r_l / len_l - 1 / (2 * IPO_TAU)
    return excess**2, -2 * excess / len_w, -2 * excess / len_l


def aggregated(loss: Tensor, dro_lambda: float | None) -> tuple[Tensor, Tensor]:
    """The batch's loss and, times B, its derivative by each pair's loss (B,)."""
    if dro_lambda is None:
        return loss.mean(), torch.ones_like(loss)
    powers = torch.exp(loss.double() / dro_lambda)
    return dro_lambda * torch.log(powers.mean()), (powers / powers.mean()).float()


def _num_response(side: TokenizedSide) -> int:
    return len(side.input_ids) - side.num_prompt


def summed(model: PreTrainedModel, batch: list[TokenizedPair]) -> Sides:
    return Sides(
        torch.stack([_log_prob(model, pair.chosen) for pair in batch]),
        torch.stack([_log_prob(model, pair.rejected) for pair in batch]),
    )


def _log_prob(model: PreTrainedModel, side: TokenizedSide) -> Tensor:
    """z = sum over response tokens of log softmax(logits)[token]."""
    ids = torch.tensor([side.input_ids])
    return _sum_of_targets(model(input_ids=ids).logits[0], side)


def _sum_of_targets(logits: Tensor, side: TokenizedSide) -> Tensor:
    """From logits (T, V) of one whole row: position t - 1 predicts token t."""
    logps = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    places = range(side.num_prompt, len(side.input_ids))
    return torch.stack([logps[place - 1, side.input_ids[place]] for place in places]).sum()


def head_geometry(model: PreTrainedModel, batch: list[TokenizedPair], weights: Sides) -> Geometry:
    """Norms and cosine of d mean(c_w z_w), d mean(c_l z_l) / d (output projection) with weights c, hidden
    states held fixed."""
    head = model.get_output_embeddings()
    weight = head.weight.detach().clone().requires_grad_()
    bias = None if head.bias is None else head.bias.detach().clone().requires_grad_()
    leaves = [weight] if bias is None else [weight, bias]

    def log_prob(side: TokenizedSide) -> Tensor:
        with torch.no_grad():
            body = model.get_decoder()(input_ids=torch.tensor([side.input_ids]))
        logits = torch.nn.functional.linear(body.last_hidden_state[0], weight, bias)
        return _sum_of_targets(logits, side)

    z = Sides(
        torch.stack([log_prob(pair.chosen) for pair in batch]),
        torch.stack([log_prob(pair.rejected) for pair in batch]),
    )
    return geometry_of(z, weights, leaves)


def full_geometry(model: PreTrainedModel, batch: list[TokenizedPair], weights: Sides) -> Geometry:
    """The same with respect to all parameters, through the whole model."""
    return geometry_of(summed(model, batch), weights, list(model.parameters()))


def geometry_of(z: Sides, weights: Sides, leaves: list[Tensor]) -> Geometry:
    sides = []
    for values, factors in zip(z, weights, strict=True):
        gradient = torch.autograd.grad((factors * values).mean(), leaves, retain_graph=True)
        sides.append(torch.cat([part.flatten() for part in gradient]))
    cosine = torch.nn.functional.cosine_similarity(sides[0], sides[1], dim=0)
    return Geometry(float(sides[0].norm()), float(sides[1].norm()), float(cosine))
