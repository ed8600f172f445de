"""The training loop, top to bottom. Called by `rcpo.launch.worker` on every rank.

Owns the order of things (reference, step, evaluation, checkpoint, final model) and what a restart needs. What
a step works on is in `coming_step`, the method in `step`, an evaluation in `evaluating`, the end in `ending`;
what users see in `rcpo.monitor.sinks` and `rcpo.monitor.summary`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rcpo.config.resolved import ResolvedConfig
from rcpo.data.inputs import Inputs
from rcpo.data.sampler import PairSampler
from rcpo.engine.engine import Engine
from rcpo.method.calibrators import build_calibrator
from rcpo.models.evaluation import peak_memory_gb
from rcpo.monitor.sinks import Sink, build_sinks
from rcpo.objectives import Objective
from rcpo.ranks import stopping
from rcpo.ranks.distributed import rank
from rcpo.reference.maker import ReferenceMaker
from rcpo.reference.moving import MovingReference
from rcpo.runs.answers import rewind_answers
from rcpo.runs.folder import RunFolder
from rcpo.training.after_evaluation import reason_to_end
from rcpo.training.aggregate import aggregate_of
from rcpo.training.agreement import check_agreement
from rcpo.training.by_sign import slots_of_step
from rcpo.training.checkpoint import REFERENCE, checkpoint_to_resume, load_checkpoint
from rcpo.training.coming_step import first_pass, micro_batches_of, mismatched_of, num_tokens_of
from rcpo.training.ending import finish
from rcpo.training.evaluating import evaluate, evaluate_probe, evaluate_start, is_due, lacks_evaluation
from rcpo.training.measurements import Measurements
from rcpo.training.micro_batch import MicroBatch
from rcpo.training.rehearsal import rehearse, told_when_full
from rcpo.training.setbacks import save_or_go_on, skip_or_stop, stop_with_checkpoint
from rcpo.training.state import Method, Training, TrainState
from rcpo.training.step import NonFiniteStepError, TrainedStep, train_step


class StepWatch:
    """Looks at every step from outside, and changes nothing; `rcpo.bench` has one of its own."""

    def before(self, training: Training, micro_batches: Sequence[MicroBatch]) -> None:
        """The step is about to run on this rank's micro-batches."""

    def after(self, trained: TrainedStep) -> None:
        """It has run."""


def train(
    config: ResolvedConfig,
    run: RunFolder,
    inputs: Inputs,
    device: torch.device,
    resume: bool,
    watch: StepWatch | None = None,
    at_end: Callable[[], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Train a resolved config in its run folder; returns the summary. Rank 0 calls `at_end` with the model
    in final/; the scores that it returns go to every sink. Collective.

    Raises UserError when the model cannot be used or no checkpoint can be loaded, and its kinds in
    `rcpo.common.errors` when the run stops before its end.
    """
    training, is_new = _made_ready(config, run, inputs, device, resume)
    with stopping.deferred(), _closed_on_failure(training.sinks):
        if is_new:
            evaluate_start(training)
        reason = _train_steps(training, watch or StepWatch())
        return finish(training, reason, at_end or dict)


def _made_ready(
    config: ResolvedConfig, run: RunFolder, inputs: Inputs, device: torch.device, resume: bool
) -> tuple[Training, bool]:
    """Everything that stands before the first step: reference, engine, held-out start, rehearsal, what a
    checkpoint kept, sinks; and whether the run begins at step 0. Collective."""
    torch.manual_seed(config.seed)
    objective = config.objective_function
    sampler = inputs.sampler(config)
    num_steps = inputs.num_steps(config)
    checkpoint = checkpoint_to_resume(run) if resume else None
    mismatches = sampler.all_mismatches(num_steps) if objective.needs_mismatched else []
    visited = sampler.visited(num_steps)
    calibrator = build_calibrator(config.calibration, sampler.num_fresh_steps, config.optim.first_decay)
    visits = first_pass(config, sampler, num_steps, calibrator)
    maker = ReferenceMaker(config, run, inputs, visited, mismatches, checkpoint is not None, visits)
    maker.run_own_model(device)
    with told_when_full(_too_large(config)):
        engine = Engine(config, num_steps, device, inputs.sees)
    check_agreement(config, inputs, engine)
    slots = slots_of_step(inputs.train.slots)
    measurements = Measurements(config, engine, slots)
    state = TrainState(0, calibrator, _initial_state(objective, inputs, sampler))
    reference, start = maker.open(engine)
    method = Method(
        engine,
        objective,
        aggregate_of(config.composition),
        config.train.pairs_per_step * slots,
        slots,
        config.model.router_loss,
        config.composition.weight_of == "batch",
    )
    moving = MovingReference(config, inputs, engine) if config.reference.sync_every else None
    num_bytes = reference.num_bytes + (0 if moving is None else moving.num_bytes)
    rehearse(config, inputs, method, sampler, num_steps, reference, measurements, state, num_bytes)
    if checkpoint is not None:
        if moving is not None:
            moving.load(checkpoint / REFERENCE)
        values, scores = load_checkpoint(checkpoint, engine)
        state.load_state_dict(values)
        measurements.load_state(scores)
    sinks = _start_sinks(config, run, num_steps, state.step)
    training = Training(
        config=config,
        run=run,
        inputs=inputs,
        method=method,
        sampler=sampler,
        num_steps=num_steps,
        state=state,
        measurements=measurements,
        reference=reference,
        start=start,
        sinks=sinks,
        moving=moving,
    )
    return training, checkpoint is None


def _too_large(config: ResolvedConfig) -> str:
    """What a user reads where not even the weights with gradients and optimizer fit."""
    higher = f"deepspeed.stage={config.zero_stage + 1}, " if config.zero_stage < 3 else ""
    return (
        f"model.path={config.model.path}: its weights, gradients and optimizer do not fit into memory at "
        f"deepspeed.stage={config.zero_stage} on {config.world_size()} ranks; type {higher}"
        "deepspeed.offload=optimizer or model.lora.rank=16, or use more GPUs"
    )


def _train_steps(training: Training, watch: StepWatch) -> str | None:
    """Optimizer steps up to the run's end, with their rows, evaluations and checkpoints; why it ended early,
    if it did. Collective."""
    config, state, engine = training.config, training.state, training.engine
    time_left = stopping.of_this_job()
    # A stop before the evaluation did not wait for it.
    reason = evaluate(training) if lacks_evaluation(training) else reason_to_end(training)
    while state.step < training.num_steps and reason is None:
        started = time.perf_counter()
        measurement = training.measurements.at(state.step, state.calibrator)
        micro_batches = micro_batches_of(training, measurement)
        num_tokens = num_tokens_of(training.inputs, training.sampler.global_batch(state.step))
        lr = engine.lr()
        probe = evaluate_probe(training) if state.calibrator.probes_at(state.step) else None
        mismatched = mismatched_of(training) if training.method.objective.needs_mismatched else []
        watch.before(training, micro_batches)
        try:
            trained = train_step(
                training.method, state, micro_batches, measurement, probe,
                lambda: stopping.asked() or time_left.is_up(), mismatched,
            )  # fmt: skip
        except NonFiniteStepError as error:
            trained = TrainedStep(skip_or_stop(training, error), stop=False)
        else:
            if training.moving is not None:
                training.moving.after(state.step)
            watch.after(trained)
        seconds = time.perf_counter() - started
        time_left.longest_step = max(time_left.longest_step, seconds)
        row = trained.row | {
            "step": state.step,
            "train/lr": lr,
            "train/grad_norm": engine.grad_norm(),
            "train/epoch": training.sampler.epoch(state.step),
            "train/nonfinite_steps": state.num_nonfinite_steps,
            "speed/step_seconds": seconds,
            "speed/pairs_per_second": config.train.pairs_per_step / seconds,
            "speed/tokens_per_second": num_tokens / seconds,
            "speed/peak_memory_gb": peak_memory_gb(engine.device),
        }
        for sink in training.sinks:
            sink.log_step(row)
        is_end = state.step == training.num_steps
        if trained.stop and not is_end:
            stop_with_checkpoint(training, time_left.is_up())
        if is_end or is_due(state.step, config.train.eval_every):
            reason = evaluate(training)
        if reason is not None or is_due(state.step, config.train.save_every):
            save_or_go_on(training, time_left)
    return reason


@contextlib.contextmanager
def _closed_on_failure(sinks: list[Sink]) -> Iterator[None]:
    """Close the sinks as failed when what happens inside raises."""
    try:
        yield
    except BaseException:
        for sink in sinks:
            sink.close({}, 1)
        raise


def _initial_state(objective: Objective, inputs: Inputs, sampler: PairSampler) -> tuple[float, ...]:
    """The objective's batch statistics before the first step; the first global batch's lengths are known
    already."""
    sides = [side for idx in sampler.global_batch(0) for side in inputs.train[idx].sides]
    total = sum(side.num_scored for side in sides)
    return objective.initial_state(2 * total / len(sides))


def _start_sinks(config: ResolvedConfig, run: RunFolder, num_steps: int, start_step: int) -> list[Sink]:
    """The sinks, on rank 0 alone; rows that a crash left after the checkpoint are dropped, to be written
    again."""
    if rank() != 0:
        return []
    kept = start_step if start_step > 0 else -1
    run.rewind(kept)
    rewind_answers(run, kept)
    return build_sinks(config, run, num_steps, start_step)
