"""The training loop: one function, top to bottom. Called by `rcpo.worker` on every rank.

Owns the order of things (reference, step, evaluation, checkpoint, final model) and what a restart needs. The
method is in `rcpo.step`, what users see in `rcpo.sinks` and `rcpo.report`.
"""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rcpo.aggregate import aggregate_of
from rcpo.calibration import build_calibrator
from rcpo.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from rcpo.config.schema import Config
from rcpo.console import RunConsole, passes_shown
from rcpo.data.batch import collate
from rcpo.data.sampler import PairSampler
from rcpo.data.tokenize import TokenizedPair
from rcpo.distributed import barrier, from_rank_zero, rank, world_size
from rcpo.engine import Engine
from rcpo.errors import UserError
from rcpo.evaluation import SideLogProbs, measure_logprobs, peak_memory_gb
from rcpo.inputs import Inputs
from rcpo.measurement import Measurements
from rcpo.metrics import displacement_row
from rcpo.model import save_model
from rcpo.objectives import Objective, composition_of, objective_of
from rcpo.plot import plot_run
from rcpo.reference import ReferenceCache, ReferenceTable, shared_reference, weights_fingerprint
from rcpo.report import model_card, summarize
from rcpo.run_folder import RunFolder
from rcpo.sinks import Sink, build_sinks
from rcpo.step import MicroBatch, TrainState, train_step

logger = logging.getLogger(__name__)

START_TOLERANCE_NATS = 0.05
"""Largest |mean r| of the first batch in fp32 that padding and summation order explain; bf16 gets 20 times as
much."""


def train(
    config: Config, run: RunFolder, inputs: Inputs, device: torch.device, resume: bool
) -> dict[str, Any]:
    """Train a resolved config in its run folder; returns the summary. Collective.

    Raises UserError when the model cannot be used or a checkpoint cannot be loaded.
    """
    torch.manual_seed(config.seed)
    objective = objective_of(config.objective)
    sampler = inputs.sampler(config)
    num_steps = inputs.num_steps(config)
    engine = Engine(config, num_steps, device)
    calibrator = build_calibrator(config.calibration, sampler.num_fresh_steps)
    state = TrainState(0, calibrator, _initial_state(objective, inputs, sampler))
    checkpoint = from_rank_zero(newest_checkpoint(run)) if resume else None
    if checkpoint is None:
        reference = _compute_reference(config, run, inputs, engine, sampler.visited(num_steps))
    else:
        reference = ReferenceTable.load(run.reference)
        state.load_state_dict(load_checkpoint(checkpoint, engine))
    sinks = _start_sinks(config, run, num_steps, state.step)
    with _closed_on_failure(sinks):
        if checkpoint is None:
            _record_evaluation(run, sinks, 0, reference.held_out, reference)
        _train_steps(config, run, inputs, engine, objective, state, reference, sinks)
        return _finish(config, run, inputs, engine, sinks)


def _train_steps(
    config: Config,
    run: RunFolder,
    inputs: Inputs,
    engine: Engine,
    objective: Objective,
    state: TrainState,
    reference: ReferenceTable,
    sinks: list[Sink],
) -> None:
    """Optimizer steps up to the run's end, with their rows, evaluations and checkpoints. Collective."""
    sampler, num_steps, device = inputs.sampler(config), inputs.num_steps(config), engine.device
    measurements = Measurements(config, engine)
    aggregate = aggregate_of(composition_of(config.objective))
    while state.step < num_steps:
        started = time.perf_counter()
        micro_batches = _micro_batches(config, inputs, sampler, reference, state.step, device)
        num_tokens = _num_tokens(inputs, sampler.global_batch(state.step))
        lr = engine.lr()
        probe_r_w = None
        if state.calibrator.probes_at(state.step):
            probe_r_w = _measure_probe(config, inputs, engine, reference)
        measurement = measurements.at(state.step, state.calibrator)
        row = train_step(
            engine,
            objective,
            state,
            micro_batches,
            config.train.pairs_per_step,
            measurement,
            aggregate,
            probe_r_w,
        )
        seconds = time.perf_counter() - started
        row |= {
            "step": state.step,
            "train/lr": lr,
            "train/grad_norm": engine.grad_norm(),
            "train/epoch": sampler.epoch(state.step),
            "speed/step_seconds": seconds,
            "speed/pairs_per_second": config.train.pairs_per_step / seconds,
            "speed/tokens_per_second": num_tokens / seconds,
            "speed/peak_memory_gb": peak_memory_gb(device),
        }
        if state.step == 1:
            _check_start(row, config.model.dtype)
        for sink in sinks:
            sink.log_step(row)
        _refuse_non_finite(row)
        if state.step == num_steps or _due(state.step, config.train.eval_every):
            result = measure_logprobs(engine, inputs.held_out, inputs.pad_id, _eval_batch(config))
            _record_evaluation(run, sinks, state.step, result, reference)
        if _due(state.step, config.train.save_every):
            save_checkpoint(run, engine, state.state_dict(), inputs.tokenizer)


@contextlib.contextmanager
def _closed_on_failure(sinks: list[Sink]) -> Iterator[None]:
    """Close the sinks as failed when what happens inside raises."""
    try:
        yield
    except BaseException:
        for sink in sinks:
            sink.close({}, 1)
        raise


def _refuse_non_finite(row: dict[str, float]) -> None:
    """Stop a run whose numbers are lost; the row that shows it has been written."""
    for key in ("train/loss", "train/grad_norm"):
        if not math.isfinite(row[key]):
            raise UserError(
                f"step {row['step']:.0f}: {key} is {row[key]}, and the weights are spoiled; train again with "
                "a smaller optim.lr=..., or resume if the newest checkpoint is from well before this step"
            )


def _due(step: int, every: int | None) -> bool:
    """Whether something happens after optimizer step `step` (counted from 1); never with every = 0."""
    return every is not None and every > 0 and step % every == 0


def _measure_probe(config: Config, inputs: Inputs, engine: Engine, reference: ReferenceTable) -> float:
    """Mean r_w of the probe pairs, the first of the held-out ones. Collective."""
    pairs = inputs.held_out[: config.calibration.feedback.pairs]
    result = measure_logprobs(engine, pairs, inputs.pad_id, _eval_batch(config))
    return float((result.z_w - reference.held_out.z_w[: len(pairs)]).double().mean())


def _eval_batch(config: Config) -> int:
    """Pairs of one forward pass without gradients: four micro-batches' worth take less memory than one step
    does."""
    assert config.train.pairs_per_device is not None
    return max(4, 4 * config.train.pairs_per_device)


def _initial_state(objective: Objective, inputs: Inputs, sampler: PairSampler) -> tuple[float, ...]:
    """The objective's batch statistics before the first step; the first global batch's lengths are known
    already."""
    sides = [
        side
        for idx in sampler.global_batch(0)
        for side in (inputs.train[idx].chosen, inputs.train[idx].rejected)
    ]
    total = sum(len(side.input_ids) - side.num_prompt for side in sides)
    return objective.initial_state(2 * total / len(sides))


def _num_tokens(inputs: Inputs, indices: list[int]) -> int:
    """Tokens of these training pairs, both sides, prompt and response, without padding."""
    return sum(
        len(inputs.train[idx].chosen.input_ids) + len(inputs.train[idx].rejected.input_ids) for idx in indices
    )


def _micro_batches(
    config: Config,
    inputs: Inputs,
    sampler: PairSampler,
    reference: ReferenceTable,
    step: int,
    device: torch.device,
) -> list[MicroBatch]:
    assert config.train.pairs_per_device is not None
    micro_batches = []
    for indices in sampler.micro_batches(step, rank(), world_size(), config.train.pairs_per_device):
        ref_w, ref_l = reference.train_rows(indices)
        batch = collate([inputs.train[idx] for idx in indices], inputs.pad_id)
        weight = torch.tensor([inputs.train[idx].weight for idx in indices])
        micro_batches.append(
            MicroBatch(batch.to(device), ref_w.to(device), ref_l.to(device), weight.to(device))
        )
    return micro_batches


def _compute_reference(
    config: Config, run: RunFolder, inputs: Inputs, engine: Engine, visited: list[int]
) -> ReferenceTable:
    """Reference log-probs of all held-out pairs and of the training pairs that the run visits, under the
    initial weights, from the cache where it has them; kept in the run folder. Collective."""
    cache = ReferenceCache(weights_fingerprint(config.model)) if rank() == 0 else None
    pairs = [inputs.train[idx] for idx in visited] + inputs.held_out
    started = time.perf_counter()

    def compute(missing: Sequence[TokenizedPair]) -> SideLogProbs:
        shown = passes_shown(RunConsole(), "reference log-probs", len(missing))
        with shown if rank() == 0 else contextlib.nullcontext(lambda num_done: None) as on_batch:
            return measure_logprobs(engine, missing, inputs.pad_id, _eval_batch(config), on_batch)

    values, num_computed = shared_reference(cache, pairs, compute)
    logger.info(
        "reference log-probs of %d pairs: %d sides computed in %.1f s, the rest from the cache",
        len(pairs), num_computed, time.perf_counter() - started,
    )  # fmt: skip
    train_w = torch.full((len(inputs.train),), math.nan)
    train_l = torch.full((len(inputs.train),), math.nan)
    train_w[visited], train_l[visited] = values.z_w[: len(visited)], values.z_l[: len(visited)]
    held_out = SideLogProbs(values.z_w[len(visited) :], values.z_l[len(visited) :])
    table = ReferenceTable(SideLogProbs(train_w, train_l), held_out)
    if cache is not None:
        table.save(run.reference)
    barrier()
    return table


def _check_start(row: dict[str, float], dtype: str) -> None:
    """Warn when policy and reference disagree before the first update."""
    tolerance = START_TOLERANCE_NATS * (20 if dtype == "bfloat16" else 1)
    largest = max(abs(row["displacement/chosen"]), abs(row["displacement/rejected"]))
    if largest > tolerance:
        logger.warning(
            "policy and reference differ by %.3f nats before the first update (tolerance %.2f): another "
            "dtype or attention kernel, dropout, or a reference cache of other weights",
            largest,
            tolerance,
        )


def _start_sinks(config: Config, run: RunFolder, num_steps: int, start_step: int) -> list[Sink]:
    """The sinks, on rank 0 alone; rows that a crash left after the checkpoint are dropped, to be written
    again."""
    if rank() != 0:
        return []
    run.rewind(start_step if start_step > 0 else -1)
    return build_sinks(config, run, num_steps, start_step)


def _record_evaluation(
    run: RunFolder, sinks: list[Sink], step: int, result: SideLogProbs, reference: ReferenceTable
) -> None:
    """Displacement of the held-out pairs against step 0, to every sink; per-pair results to the run
    folder."""
    if rank() != 0:
        return
    row = displacement_row(result.z_w, result.z_l, reference.held_out.z_w, reference.held_out.z_l)
    run.save_pair_results(step, result)
    for sink in sinks:
        sink.log_eval({"step": step} | row)


def _finish(
    config: Config, run: RunFolder, inputs: Inputs, engine: Engine, sinks: list[Sink]
) -> dict[str, Any]:
    """Write final/, the plot and the summary. Collective."""
    weights = engine.whole_weights()
    if weights is None:
        return {}
    beside = run.path / ".final.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    save_model(engine.policy.model, weights, inputs.tokenizer, beside)
    summary = summarize(run.rows(run.metrics), run.rows(run.eval))
    (beside / "README.md").write_text(model_card(config, summary), encoding="utf-8")
    shutil.rmtree(run.final, ignore_errors=True)
    beside.rename(run.final)
    plot_run(run, run.plot)
    for sink in sinks:
        sink.close(summary, 0)
    return summary
