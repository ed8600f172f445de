"""`rcpo.Calibrator`: alpha in a training loop of somebody else's.

Owns what such a loop does not: incentives by autograd, the sums over micro-batches and ranks, when to
measure, and the calibrator's state. The kinds are rcpo's own (`rcpo.method.calibrators`), and so is every
number that `update` returns (`rcpo.method.metrics`).
"""

import copy
import math
import typing
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rcpo.common.conf import conf_dir, option_tree
from rcpo.common.errors import UserError
from rcpo.config.calibration import CalibrationConfig
from rcpo.config.rules import check_calibration
from rcpo.config.validate import section_of
from rcpo.library.score_vectors import HeadScoreVectors, ParameterScoreVectors, ScoreVectors
from rcpo.method.calibrators import build_calibrator
from rcpo.method.incentives import Incentives, loss_and_incentives
from rcpo.method.metrics import QUANTITIES, pair_sums, statistics_of, step_row
from rcpo.method.scores import ScoreGeometry, partial_dot
from rcpo.method.statistics import Probe
from rcpo.objectives import Objective, PairLogProbs, objective_of

# B pairs of a micro-batch.
KINDS: tuple[str, ...] = typing.get_args(typing.get_type_hints(CalibrationConfig)["name"])
"""Every kind of calibration that a config may name."""


class Calibrator:
    """Reward calibration for a loop of your own, with any model, optimizer and DDP.

        calibrator = rcpo.Calibrator("on", "dpo", head=model.get_output_embeddings())
        for batches in loader:                             # the micro-batches of one optimizer step
            for batch in batches:
                z_w, z_l = summed_logps(model, batch)      # (B,) each, fp32, attached to the graph
                loss = calibrator.surrogate(z_w, z_l, batch.ref_w, batch.ref_l, batch.len_w, batch.len_l)
                (loss / len(batches)).backward()
            row = calibrator.update()                      # once a step; numbers as in metrics.jsonl
            optimizer.step()
            optimizer.zero_grad()

    `kind` is an option of `calibration=` and `options` are its keys, with the defaults of the command line:
    `rcpo.Calibrator("on", "simpo", head=head, every=1)`. on and exact read score vectors of a module that
    makes logits (`head`, as on does on the command line) or of `parameters` (all of them, as exact does);
    these must be whole on every rank: no ZeRO 3, no FSDP. The other kinds need neither. What measures z on
    held-out pairs (balance; feedback, after its first pass over the data) says so in `wants_probe`.

    Under torch.distributed alpha is the same on every rank: `update` is collective.
    """

    def __init__(
        self,
        kind: str,
        objective: Objective | str,
        *,
        head: nn.Module | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        first_pass_steps: int = 0,
        momentum: float = 0.9,
        log_probs: str | None = None,
        group: "dist.ProcessGroup | None" = None,
        **options: Any,
    ) -> None:
        """`first_pass_steps`: optimizer steps at the start whose pairs are all new to the run, one pass over
        the data; feedback steers by them. `momentum`: AdamW's first decay rate, or SGD's momentum, which
        balance takes into account. `log_probs`: mean where an objective given by name is to read z
        averaged over tokens; `surrogate` takes sums all the same. `group`: the data-parallel ranks, where
        they are not all. Raises UserError, one line, for an unknown kind or option, or where a kind lacks
        what it measures."""
        config = _config_of(kind, options)
        self.kind = kind
        if isinstance(objective, str):
            objective = objective_of({"name": objective, "log_probs": log_probs or "sum"})
        elif log_probs is not None:
            raise UserError(
                f"log_probs={log_probs}: is for an objective given by name; write "
                f"rcpo.Calibrator({kind!r}, {objective.name!r}, log_probs=...)"
            )
        self.objective = objective
        _refuse_whole_batches(self.objective)
        self._calibrator = build_calibrator(config, first_pass_steps, momentum)
        self._weighted = config.estimator == "weighted"
        if self._calibrator.per_micro_batch and group is not None:
            raise UserError(
                f"Calibrator({kind!r}, ...): has a state for every rank there is; leave group out"
            )
        self._group = group
        self._step = 0
        self._vectors = _vectors_of(kind, self._measures(), head, parameters)
        self._state: tuple[float, ...] | None = None
        self._sums: Tensor | None = None
        self._has_reference = True
        self._watch_if_due()

    @property
    def alpha(self) -> float:
        """The factor of this step: d_w becomes alpha d_w, d_l becomes d_l / alpha."""
        return self._calibrator.alpha()

    @property
    def wants_probe(self) -> bool:
        """Whether this step's `update` needs the displacement of held-out pairs, measured before the
        optimizer steps: the mean of z_w - ref_w, in nats."""
        return self._calibrator.probes_at(self._step)

    def surrogate(
        self,
        z_w: Tensor,
        z_l: Tensor,
        ref_w: Tensor | None,
        ref_l: Tensor | None,
        len_w: Tensor,
        len_l: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """A scalar for backward(), of one micro-batch: its value is the objective's mean loss, its gradient
        that of the calibrated loss, mean(-alpha d_w grad z_w + (d_l / alpha) grad z_l).

        All tensors are (B,): z_w and z_l summed over response tokens, in fp32 and attached to the graph; the
        reference's, None only where the objective needs none and nothing steers by it; the lengths of the
        responses in tokens; `weight`, which multiplies a pair's loss.
        """
        pair = self._pair(z_w, z_l, ref_w, ref_l, len_w, len_l)
        loss, (d_w, d_l) = loss_and_incentives(self.objective, self.objective.view(pair))
        if weight is not None:
            weight = weight.to(loss)
            loss, d_w, d_l = weight * loss, weight * d_w, weight * d_l
        if self._sums is None:
            self._calibrator.begin()
        self._add(loss, pair, Incentives(d_w, d_l))
        if self.objective.averages:
            z_w, z_l = z_w / pair.len_w, z_l / pair.len_l
        if self._vectors is not None and self._measures():
            one = torch.ones_like(d_w)
            c_w, c_l = (d_w, d_l) if self._weighted else (one, one)
            self._vectors.add((c_w * z_w).sum(), (c_l * z_l).sum())
        geometry = None
        if self._vectors is not None and self._calibrator.per_micro_batch:
            geometry = self._geometry_of(*self._vectors.take(), len(d_w))
        alpha = self._calibrator.alpha_of(Incentives(d_w, d_l), geometry)
        value = (-alpha * d_w * z_w + d_l / alpha * z_l).mean()
        return loss.mean() + (value - value.detach())

    @torch.no_grad()
    def update(
        self, probe_r_w: float | None = None, probe_r_l: float | None = None, lr_share: float = 1.0
    ) -> dict[str, float]:
        """Take in the step, once its micro-batches have all gone through `surrogate`; the next step has
        another alpha. Collective. Returns the step's numbers, named as in metrics.jsonl.

        `probe_r_w`, `probe_r_l`: the displacement of held-out pairs, where `wants_probe` asks for it; the
        rejected side's for balance alone. `lr_share`: the step's learning rate as a part of the peak, which
        balance takes into account.
        """
        if self._sums is None:
            raise UserError(
                "calibrator.update: no surrogate() since the last one; call it once a step, after them"
            )
        if self.wants_probe and (probe_r_w is None or (probe_r_l is None and self.kind == "balance")):
            both = "probe_r_w and probe_r_l" if self.kind == "balance" else "probe_r_w"
            advice = "" if self.kind == "balance" else ", or give first_pass_steps=len(loader)"
            raise UserError(
                f"calibrator.update: {self.kind} wants {both} in this step, the means of z - ref of "
                f"held-out pairs; look at wants_probe{advice}"
            )
        probe = None if probe_r_w is None else Probe(probe_r_w, math.nan if probe_r_l is None else probe_r_l)
        num_pairs, *sums = self._reduced(self._sums).tolist()
        means = {name: total / num_pairs for name, total in zip(QUANTITIES, sums, strict=False)}
        seen = statistics_of(means, self._geometry(num_pairs), probe, lr_share)
        of_ranks = self._calibrator.of_rank(self._num_ranks)
        if of_ranks:
            shares = self._reduced(self._sums.new_tensor(list(of_ranks.values()))).tolist()
            of_ranks = dict(zip(of_ranks, shares, strict=True))
        alpha = of_ranks.get("calibration/alpha", self.alpha)
        row = step_row(means, seen, alpha, self._calibrator) | of_ranks
        self._calibrator.update(seen)
        assert self._state is not None
        columns = [total / num_pairs for total in sums[len(QUANTITIES) :]]
        self._state = self.objective.advance(self._state, columns)
        self._step += 1
        self._sums = None
        self._watch_if_due()
        row = {"step": self._step, **row, **self._calibrator.counts()}
        return row if self._has_reference else _without_displacement(row)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs, between two steps; plain numbers, the same on every rank."""
        return {
            "kind": self.kind,
            "step": self._step,
            "calibrator": self._calibrator.state_dict(),
            "objective_state": None if self._state is None else list(self._state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take `state_dict` back. Raises UserError where it is of another kind."""
        if state.get("kind") != self.kind:
            raise UserError(f"calibrator: this one is {self.kind}, and the state is of {state.get('kind')}")
        self._step = state["step"]
        self._calibrator.load_state_dict(state["calibrator"])
        self._state = None if state["objective_state"] is None else tuple(state["objective_state"])
        self._sums = None
        self._watch_if_due()

    def _watch_if_due(self) -> None:
        if self._vectors is not None:
            self._vectors.watch(self._measures())

    def _measures(self) -> bool:
        """Whether this step's micro-batches give score vectors."""
        return self._calibrator.per_micro_batch or self._calibrator.measures_at(self._step)

    def _pair(
        self,
        z_w: Tensor,
        z_l: Tensor,
        ref_w: Tensor | None,
        ref_l: Tensor | None,
        len_w: Tensor,
        len_l: Tensor,
    ) -> PairLogProbs:
        """The micro-batch as the objective sees it, detached. Raises UserError for what cannot be trained."""
        _check("z_w", z_w, z_w)
        if not z_w.requires_grad and torch.is_grad_enabled():
            raise UserError(
                "z_w: is not attached to the graph; give it before detach(), outside torch.no_grad()"
            )
        self._has_reference = ref_w is not None and ref_l is not None
        if not self._has_reference and (self.objective.needs_reference or self._calibrator.steers_by_batches):
            who = self.objective.name if self.objective.needs_reference else f"calibration {self.kind}"
            raise UserError(f"ref_w, ref_l: are None, and {who} needs them; give z of the reference model")
        zeros = torch.zeros_like(z_w)
        given = {
            "z_l": z_l,
            "ref_w": zeros if ref_w is None else ref_w,
            "ref_l": zeros if ref_l is None else ref_l,
            "len_w": len_w,
            "len_l": len_l,
        }
        for name, values in given.items():
            _check(name, values, z_w)
        rest = {name: values.detach().to(z_w.device, z_w.dtype) for name, values in given.items()}
        if self._state is None:
            length = (rest["len_w"] + rest["len_l"]).double().mean()
            if (
                self.objective.num_statistics
            ):  # of the first micro-batches alone, where a run takes all of them
                length = self._reduced(length) / self._num_ranks
            self._state = self.objective.initial_state(float(length))
        z_l, ref_w, ref_l, len_w, len_l = rest.values()
        return PairLogProbs(z_w.detach(), z_l, ref_w, ref_l, len_w, len_l, self._state)

    @torch.no_grad()
    def _add(self, loss: Tensor, pair: PairLogProbs, incentives: Incentives) -> None:
        columns = self.objective.statistic_columns(pair).double().sum(1)
        count = torch.tensor([len(loss)], dtype=torch.float64, device=loss.device)
        sums = torch.cat([count, pair_sums(loss, pair, incentives), columns])
        self._sums = sums if self._sums is None else self._sums + sums

    def _geometry(self, num_pairs: float) -> ScoreGeometry | None:
        """Of the global batch, where this step measures it."""
        if self._vectors is None or not self._calibrator.measures_at(self._step):
            return None
        chosen, rejected = (self._reduced(side) for side in self._vectors.take())
        return self._geometry_of(chosen, rejected, num_pairs)

    def _geometry_of(self, chosen: Tensor, rejected: Tensor, num_pairs: float) -> ScoreGeometry:
        """From sums over so many pairs."""
        return ScoreGeometry(
            chosen_squared=float(partial_dot([chosen], [chosen])) / num_pairs**2,
            rejected_squared=float(partial_dot([rejected], [rejected])) / num_pairs**2,
            dot=float(partial_dot([chosen], [rejected])) / num_pairs**2,
            weighted=self._weighted,
        )

    def _reduced(self, values: Tensor) -> Tensor:
        """The sum over the ranks, where there are several."""
        if self._num_ranks > 1:
            dist.all_reduce(values, group=self._group)
        return values

    @property
    def _num_ranks(self) -> int:
        is_joined = dist.is_available() and dist.is_initialized()
        return dist.get_world_size(self._group) if is_joined else 1


NEUTRAL = ("objective.ld_alpha=1", "objective.wpo=false", "objective.sft_of=response")


def _refuse_whole_batches(objective: Objective) -> None:
    """Raise UserError for an objective that reads more than z of a part of the batch."""
    if objective.weighs_tokens:
        raise UserError(
            f"objective={objective.name}: weighs the tokens of z, which a loop of your own does "
            "not; take another objective"
        )
    if objective.needs_mismatched:
        raise UserError(
            f"objective={objective.name}: reads prompts with other pairs' responses, which a loop "
            "of your own does not score; take other parameters (kto: kl=mean) or another objective"
        )
    if objective.needs_lengths:
        raise UserError(
            f"objective={objective.name}: reads the lengths of the global batch before its parts, which a "
            "loop of your own gives one by one; take other parameters (acpo: tau=previous or tau=pair)"
        )
    if objective.match is not None:
        raise UserError(
            f"objective={objective.name}: compares ranks within the global batch, which a loop of "
            "your own gives in parts; take another objective"
        )
    if objective.needs_mean_tokens:
        raise UserError(
            "objective.sft_mean=tokens: is a mean over the global batch, which a loop of your own gives "
            "in parts; type objective.sft_mean=pairs"
        )
    if objective.reads_tokens:
        raise UserError(
            f"objective={objective.name}: its loss reads more than the responses' log-probs, which is all "
            f"that a loop of your own gives; type {', '.join(NEUTRAL)}"
        )


def _config_of(kind: str, options: dict[str, Any]) -> CalibrationConfig:
    """The kind's shipped options with `options` over them."""
    if kind not in KINDS:
        raise UserError(
            f"Calibrator({kind!r}, ...): no such kind of calibration; choose one of {', '.join(KINDS)}"
        )
    shipped = copy.deepcopy(option_tree(conf_dir() / "calibration" / f"{kind}.yaml"))
    for key, value in options.items():
        is_section = isinstance(value, dict) and isinstance(shipped.get(key), dict)
        shipped[key] = shipped[key] | value if is_section else value
    missing = next((key for key, value in shipped.items() if value == "???"), None)
    if missing is not None:
        raise UserError(f"{missing}: has no value and {kind} needs one; write {missing}=...")
    config = section_of(CalibrationConfig, shipped)
    check_calibration(config)
    return config


def _vectors_of(
    kind: str, measures: bool, head: nn.Module | None, parameters: Iterable[nn.Parameter] | None
) -> ScoreVectors | None:
    """Where score vectors come from; None for a kind that measures none."""
    if not measures:
        return None
    if (head is None) == (parameters is None):
        raise UserError(
            f"Calibrator({kind!r}, ...): measures score vectors; give head=model.get_output_embeddings() or "
            "parameters=model.parameters(), one of the two"
        )
    return (
        ParameterScoreVectors(parameters)
        if parameters is not None
        else HeadScoreVectors(typing.cast(nn.Module, head))
    )


def _check(name: str, values: Any, like: Tensor) -> None:
    if not isinstance(values, Tensor) or values.ndim != 1 or values.shape != like.shape:
        what = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UserError(f"{name}: is {what}; give one number a pair, (B,), as many as z_w has")
    if name in ("z_w", "z_l") and values.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"{name}: is {values.dtype}, too coarse for sums of log-probabilities; make them in torch.float32"
        )


def _without_displacement(row: dict[str, float]) -> dict[str, float]:
    """Without a reference there is nothing to measure it against."""
    return {key: value for key, value in row.items() if not key.startswith("displacement/")}
