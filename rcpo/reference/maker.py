"""Where a run's reference log-probs come from: a table made before its first step, or a live model.

Owns the order of things: which weights score which pairs, when, and what the run folder keeps. Two references
must not be mixed up. The objective's is that of `reference.path`, else the initial policy; displacement of
held-out pairs is measured against the initial policy always, and so is that of training pairs where the
objective needs no reference. Called by `rcpo.training.loop` on every rank.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rcpo.common.console import RunConsole, passes_shown
from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import PairBatch, collate
from rcpo.data.inputs import Inputs
from rcpo.data.mismatched import Mismatch
from rcpo.data.pairs import SideLogProbs
from rcpo.data.tokenize import TokenizedPair
from rcpo.engine.engine import Engine
from rcpo.models.evaluation import LogProbModel, eval_batch, evaluate_logprobs, evaluate_token_logprobs
from rcpo.models.logprobs import sum_per_side
from rcpo.models.rounding import rounded_anew
from rcpo.ranks.distributed import barrier, done_by_rank_zero, rank
from rcpo.reference.cache import (
    ReferenceCache,
    Scorable,
    pair_keys,
    shared_reference,
    weights_fingerprint,
)
from rcpo.reference.live import AdapterOff, FrozenModel, loaded_when_asked
from rcpo.reference.parts import ByLength, Parts, Passes, known_of, run_passes
from rcpo.reference.table import Reference, ReferenceRows, ReferenceTable, Start
from rcpo.reference.visits import Visit, Visits, scored
from rcpo.reference.weights import has_own_weights, reference_model
from rcpo.runs.folder import RunFolder

logger = logging.getLogger(__name__)

NOISE_PAIRS = 64
"""Held-out pairs that are scored twice more, where rounding is worth telling."""
NOTHING = SideLogProbs(torch.empty(0), torch.empty(0))


class LiveReference:
    """A model that is asked for each micro-batch; reads and keeps nothing."""

    def __init__(
        self, model: FrozenModel | AdapterOff, inputs: Inputs, config: ResolvedConfig, tokens: bool
    ) -> None:
        self._model, self._inputs, self._config = model, inputs, config
        self._tokens = tokens
        self.num_bytes = model.num_bytes

    def rows(self, indices: Sequence[int], batch: PairBatch, apart: bool = False) -> ReferenceRows:
        """As `Reference` says; on the device. With fewer pairs at a time than `batch` has, they are laid out
        anew."""
        if apart:
            z_w, z_l, of_w, of_l = scored(self._model, batch, apart)
            return ReferenceRows(z_w, z_l, torch.cat([*of_w, *of_l]) if self._tokens else None)
        return self._rows(self._inputs.train.take(indices), batch)

    def mismatched_rows(self, which: Sequence[Mismatch], batch: PairBatch) -> SideLogProbs:
        """Likewise."""
        rows = self._rows(self._inputs.mismatched(which, self._config), batch)
        return SideLogProbs(rows.ref_w, rows.ref_l)

    def logprobs(self, pairs: Sequence[TokenizedPair], pairs_per_device: int) -> SideLogProbs:
        """Of these pairs, spread over the ranks; on the CPU. Collective."""
        return evaluate_logprobs(self._model, pairs, self._inputs.pad_id, pairs_per_device)

    def _rows(self, pairs: Sequence[TokenizedPair], batch: PairBatch) -> ReferenceRows:
        size, pad_id = self._config.reference.pairs_per_device, self._inputs.pad_id
        parts = [batch]
        if size is not None and size < len(pairs):
            parts = [collate(pairs[at : at + size], pad_id) for at in range(0, len(pairs), size)]
        sides: tuple[list[torch.Tensor], ...] = ([], [], [], [])
        for part in parts:
            part = part.to(self._model.device)
            token_logps = self._model.logprobs_without_grad(part, tokens=True)
            num_chosen = part.num_chosen_tokens
            found = (
                *sum_per_side(token_logps, part).chunk(2),
                token_logps[:num_chosen],
                token_logps[num_chosen:],
            )
            for side, values in zip(sides, found, strict=True):
                side.append(values)
        ref_w, ref_l, chosen, rejected = (torch.cat(side) for side in sides)
        return ReferenceRows(ref_w, ref_l, torch.cat([chosen, rejected]) if self._tokens else None)


class ReferenceMaker:
    """Makes the reference of one run; its methods are collective."""

    def __init__(
        self,
        config: ResolvedConfig,
        run: RunFolder,
        inputs: Inputs,
        visited: list[int],
        mismatches: list[Mismatch],
        is_resumed: bool,
        visits: Sequence[Visit] = (),
    ) -> None:
        """`visited` are the training pairs that the run visits, `mismatches` those whose prompts and
        responses meet, and `visits` the micro-batches of the first pass, where the pairs beside a pair change
        its z. Where the objective weighs tokens, pairs are scored token by token too. A resumed run finds
        what its folder keeps; raises UserError where that is damaged or is of other weights than the
        reference's are now."""
        self._config, self._run, self._inputs = config, run, inputs
        self._visited, self._mismatches = visited, mismatches
        self._tokens = tokens = config.objective_function.needs_reference_tokens
        self._trained = inputs.train.take(visited)
        self._batch = config.reference.pairs_per_device or eval_batch(config)
        self._rounds = config.model.dtype == "bfloat16"  # and a pair's z depends on the pairs beside it
        self._visits: Visits | None = None
        as_asked = config.reference.pairs_per_device is not None or has_own_weights(config)
        if self._rounds and not as_asked:
            self._visits = Visits(visits, inputs.train, config.train, inputs.pad_id)
        self._is_live = config.reference.name == "live"
        self._adapter_off = config.model.lora.rank is not None and not has_own_weights(config)
        self._fingerprint = ""
        self._kept = ReferenceTable.load(run.reference) if is_resumed else None
        self._is_complete = self._kept is not None and (
            self._is_live or self._kept.has(visited, tokens, mismatches)
        )
        self._own: ReferenceTable | None = None
        if not self._is_complete or (self._is_live and not self._adapter_off):
            self._take_fingerprint()
        if config.reference.path is not None and not has_own_weights(config):
            logger.warning(
                "reference.path=%s: objective=%s needs no reference, so it is not read, and displacement is "
                "measured against the initial policy",
                config.reference.path, config.objective["name"],
            )  # fmt: skip

    def _take_fingerprint(self) -> None:
        """By rank 0; raises UserError on every rank where it is not that of the run's first start."""
        model = reference_model(self._config)
        self._fingerprint = ours = done_by_rank_zero(lambda: weights_fingerprint(model))
        theirs = "" if self._kept is None else self._kept.fingerprint
        if theirs and ours != theirs:
            raise UserError(
                f"reference: the weights in {model.path} are not those that the run was started with; put "
                "them back, or start a new run"
            )

    def run_own_model(self, device: torch.device) -> None:
        """The pass of the model that `reference.path` names, where there is one and the reference is cached:
        before there is a policy, which then finds that model's memory free again."""
        if self._is_live or self._is_complete or not has_own_weights(self._config):
            return
        with loaded_when_asked(self._config, device) as model:
            values = self._logprobs_of(self._fingerprint, self._trained, model)
            self._own = self._table(values, NOTHING)
            self._add_mismatched(self._own, model)
            self._add_tokens(self._own, model)
            self._own.held_out_reference = self._logprobs_of(self._fingerprint, self._inputs.held_out, model)

    def open(self, engine: Engine) -> tuple[Reference, Start]:
        """The reference, and what displacement of held-out pairs is measured against; `engine` has its
        initial weights."""
        num_probed, own_weights = self._inputs.num_probed(self._config), has_own_weights(self._config)
        if self._kept is not None and self._is_complete:
            table = self._kept
            live = self._live(engine) if self._is_live else None
        else:
            table = self._started_live(engine) if self._is_live else self._computed(engine)
            if self._rounds:
                self._add_start_as_evaluated(table, engine)
            live = self._live(engine) if self._is_live else None
            if live is not None and own_weights:
                table.held_out_reference = live.logprobs(self._inputs.held_out, self._batch)
            if rank() == 0:
                table.save(self._run.reference)
            barrier()
        return live or table, table.start(num_probed, own_weights)

    def _add_start_as_evaluated(self, table: ReferenceTable, engine: Engine) -> None:
        """The held-out pairs in exactly the batches of later evaluations and probes, and what rounding alone
        makes of them."""

        def evaluated(num_pairs: int) -> Tensor:
            pairs, size = self._inputs.held_out[:num_pairs], eval_batch(self._config)
            return torch.stack([*evaluate_logprobs(engine, pairs, self._inputs.pad_id, size)])

        table.held_out = SideLogProbs(*evaluated(len(self._inputs.held_out)))
        num_probed = self._inputs.num_probed(self._config)
        if num_probed:
            table.probe = SideLogProbs(*evaluated(num_probed))
        found = evaluated(NOISE_PAIRS)
        with rounded_anew(engine.policy.model):
            again = evaluated(NOISE_PAIRS)
        table.noise = float((again - found).double().square().mean().sqrt())

    def _live(self, engine: Engine) -> LiveReference:
        model = AdapterOff(engine) if self._adapter_off else FrozenModel(self._config, engine.device)
        return LiveReference(model, self._inputs, self._config, self._tokens)

    def _started_live(self, engine: Engine) -> ReferenceTable:
        """A table without training pairs."""
        start = NOTHING
        if not self._rounds:
            start = evaluate_logprobs(engine, self._inputs.held_out, self._inputs.pad_id, self._batch)
        return ReferenceTable(NOTHING, start, fingerprint=self._fingerprint)

    def _computed(self, engine: Engine) -> ReferenceTable:
        """The table, from the cache where it has the rows."""
        if self._own is not None:
            if not self._rounds:
                self._own.held_out = self._start(engine) if self._kept is None else self._kept.held_out
            return self._own
        if self._visits is not None:
            return self._computed_as_visited(engine, self._visits)
        num_trained = len(self._trained)
        pairs = [*self._trained, *([] if self._rounds else self._inputs.held_out)]
        values = self._logprobs_of(self._fingerprint, pairs, lambda: engine)
        held_out = SideLogProbs(values.z_w[num_trained:], values.z_l[num_trained:])
        table = self._table(SideLogProbs(values.z_w[:num_trained], values.z_l[:num_trained]), held_out)
        self._add_mismatched(table, lambda: engine)
        self._add_tokens(table, lambda: engine)
        return table

    def _computed_as_visited(self, engine: Engine, visits: Visits) -> ReferenceTable:
        """The table, each pair as the policy will first meet it; the held-out pairs are to come."""
        wanted = [visits.by_pair[idx] for idx in self._visited]
        values = self._shared(
            self._fingerprint, wanted, lambda missing: visits.passes(engine, missing), lambda each: each.keys
        )
        table = self._table(values, NOTHING)
        self._add_mismatched(table, lambda: engine)
        if self._tokens:
            table.tokens = visits.tokens(engine)
        return table

    def _start(self, engine: Engine) -> SideLogProbs:
        """The held-out pairs under the policy's initial weights, whose cache is not the reference's."""
        fingerprint = done_by_rank_zero(lambda: weights_fingerprint(self._config.model))
        return self._logprobs_of(fingerprint, self._inputs.held_out, lambda: engine)

    def _table(self, trained: SideLogProbs, held_out: SideLogProbs) -> ReferenceTable:
        """From values of the visited training pairs."""
        sides = []
        for values in trained:
            side = torch.full((len(self._inputs.train),), math.nan)
            side[self._visited] = values
            sides.append(side)
        return ReferenceTable(SideLogProbs(*sides), held_out, fingerprint=self._fingerprint)

    def _add_mismatched(self, table: ReferenceTable, model: Callable[[], LogProbModel]) -> None:
        """The mismatched pairs, where the objective needs them; in batches of their own."""
        if self._mismatches:
            pairs = self._inputs.mismatched(self._mismatches, self._config)
            values = self._logprobs_of(self._fingerprint, pairs, model)
            both = zip(values.z_w.tolist(), values.z_l.tolist(), strict=True)
            table.mismatched = dict(zip(self._mismatches, both, strict=True))

    def _add_tokens(self, table: ReferenceTable, model: Callable[[], LogProbModel]) -> None:
        """The training pairs token by token, by a pass of their own, which no cache saves."""
        if self._tokens:
            token_logps = evaluate_token_logprobs(model(), self._trained, self._inputs.pad_id, self._batch)
            table.tokens = dict(zip(self._visited, token_logps, strict=True))

    def _logprobs_of(
        self, fingerprint: str, pairs: Sequence[TokenizedPair], model: Callable[[], LogProbModel]
    ) -> SideLogProbs:
        """Log-probs of `pairs` from the cache of these weights; what it lacks, `model` computes for it."""

        def passes(missing: Sequence[TokenizedPair]) -> ByLength:
            return ByLength(model(), missing, self._inputs.pad_id, self._batch)

        return self._shared(fingerprint, pairs, passes, pair_keys)

    def _shared(
        self,
        fingerprint: str,
        pairs: Sequence[Scorable],
        passes_of: Callable[[Sequence[Scorable]], Passes],
        keys_of: Callable[[Scorable], tuple[bytes, bytes]],
    ) -> SideLogProbs:
        """The same of whatever has keys and goes through a model in `passes_of` what the cache lacks."""
        cache = ReferenceCache(fingerprint) if rank() == 0 else None
        parts = None if cache is None else Parts(cache)
        started = time.perf_counter()

        def compute(missing: Sequence[Scorable]) -> SideLogProbs:
            passes = passes_of(missing)
            known = known_of(passes, parts)
            num_here, console = len(pairs) - len(missing) + len(known), RunConsole()
            if num_here and rank() == 0:
                console.print(f"reference: {num_here:,} of {len(pairs):,} pairs were here", soft_wrap=True)
            shown = passes_shown(console, "reference log-probs", len(missing) - len(known))
            with shown if rank() == 0 else contextlib.nullcontext(lambda num_done: None) as on_batch:
                return run_passes(passes, [keys_of(each) for each in missing], known, parts, on_batch)

        values, num_computed = shared_reference(cache, pairs, compute, keys_of)
        logger.info(
            "reference log-probs of %d pairs: %d sides computed in %.1f s, the rest from the cache",
            len(pairs), num_computed, time.perf_counter() - started,
        )  # fmt: skip
        if parts is not None:
            parts.remove_known()
        return values
