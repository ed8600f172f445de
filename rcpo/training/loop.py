"""The training loop: one function, top to bottom. Called by `rcpo.launch.worker` on every rank.

Owns the order of things (reference, step, evaluation, checkpoint, final model) and what a restart needs. The
method is in `rcpo.training.step`, what users see in `rcpo.monitor.sinks` and `rcpo.monitor.summary`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rcpo.common.files import replacing
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import PairBatch
from rcpo.data.inputs import Inputs
from rcpo.data.joint import lay_out
from rcpo.data.lists import lists_of
from rcpo.data.pairs import SideLogProbs, TokenizedPair, present_in_pairs, without_missing
from rcpo.data.pictures import sight_of
from rcpo.data.sampler import PairSampler, dealt
from rcpo.engine.engine import Engine
from rcpo.method.calibrators import Calibrator, build_calibrator
from rcpo.method.metrics import displacement_row, list_row
from rcpo.method.statistics import Probe
from rcpo.models.evaluation import eval_batch, evaluate_logprobs, peak_memory_gb
from rcpo.models.load import save_model
from rcpo.monitor.model_card import model_card
from rcpo.monitor.plot import plot_run
from rcpo.monitor.sinks import Sink, build_sinks
from rcpo.monitor.summary import summarize
from rcpo.objectives import Objective
from rcpo.ranks import stopping
from rcpo.ranks.distributed import done_by_rank_zero, from_rank_zero, rank, world_size
from rcpo.ranks.transfer import to_device
from rcpo.reference.maker import ReferenceMaker
from rcpo.reference.moving import MovingReference
from rcpo.reference.visits import Visit
from rcpo.runs.answers import rewind_answers
from rcpo.runs.folder import RunFolder
from rcpo.training.after_evaluation import after_evaluation, end_of_summary, reason_to_end
from rcpo.training.aggregate import aggregate_of
from rcpo.training.agreement import check_agreement
from rcpo.training.answers import note_answers
from rcpo.training.by_sign import slots_of_step, with_lists
from rcpo.training.checkpoint import REFERENCE, checkpoint_to_resume, load_checkpoint
from rcpo.training.gold import gold_row
from rcpo.training.held_out_loss import held_out_loss
from rcpo.training.looking import vision_row
from rcpo.training.measurement import Measurement
from rcpo.training.measurements import Measurements, kind_at
from rcpo.training.micro_batch import MicroBatch, made_for
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
    torch.manual_seed(config.seed)
    objective = config.objective_function
    sampler = inputs.sampler(config)
    num_steps = inputs.num_steps(config)
    checkpoint = checkpoint_to_resume(run) if resume else None
    mismatches = sampler.all_mismatches(num_steps) if objective.needs_mismatched else []
    visited = sampler.visited(num_steps)
    calibrator = build_calibrator(config.calibration, sampler.num_fresh_steps, config.optim.first_decay)
    visits = _first_pass(config, sampler, num_steps, calibrator)
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
    with stopping.deferred(), _closed_on_failure(sinks):
        if checkpoint is None:
            result = SideLogProbs(start.z_w, start.z_l)
            _note_evaluation(training, result, start.reference, _further_row(training, result))
            note_answers(training)
        reason = _train_steps(training, watch or StepWatch())
        return _finish(training, reason, at_end or dict)


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
    reason = _evaluate(training) if _lacks_evaluation(training) else reason_to_end(training)
    while state.step < training.num_steps and reason is None:
        started = time.perf_counter()
        measurement = training.measurements.at(state.step, state.calibrator)
        micro_batches = _micro_batches(training, measurement)
        num_tokens = _num_tokens(training.inputs, training.sampler.global_batch(state.step))
        lr = engine.lr()
        probe = _evaluate_probe(training) if state.calibrator.probes_at(state.step) else None
        mismatched = _mismatched(training) if training.method.objective.needs_mismatched else []
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
        if is_end or _due(state.step, config.train.eval_every):
            reason = _evaluate(training)
        if reason is not None or _due(state.step, config.train.save_every):
            save_or_go_on(training, time_left)
    return reason


def _evaluate(training: Training) -> str | None:
    """Displacement of the held-out pairs, to every sink; why the run ends with it, if it does. Collective."""
    pairs, pad_id = training.inputs.held_out, training.inputs.pad_id
    result = evaluate_logprobs(training.engine, pairs, pad_id, eval_batch(training.config))
    of_reference = training.start.reference
    if training.moving is not None:
        of_reference = training.moving.logprobs(pairs, eval_batch(training.config))
    _note_evaluation(training, result, of_reference, _further_row(training, result))
    note_answers(training)
    return after_evaluation(training)


def _lacks_evaluation(training: Training) -> bool:
    """Whether a resumed run has none of the step that it goes on from, and one is due there. Collective."""
    step, run = training.state.step, training.run
    if step == 0 or step == training.num_steps or not _due(step, training.config.train.eval_every):
        return False
    return bool(from_rank_zero(rank() == 0 and all(row["step"] != step for row in run.rows(run.eval))))


@contextlib.contextmanager
def _closed_on_failure(sinks: list[Sink]) -> Iterator[None]:
    """Close the sinks as failed when what happens inside raises."""
    try:
        yield
    except BaseException:
        for sink in sinks:
            sink.close({}, 1)
        raise


def _due(step: int, every: int) -> bool:
    """Whether something happens after optimizer step `step` (counted from 1); never with every = 0."""
    return every > 0 and step % every == 0


def _evaluate_probe(training: Training) -> Probe:
    """Displacement of the probe pairs, the first of the held-out ones. Collective."""
    inputs = training.inputs
    pairs = inputs.held_out[: inputs.num_probed(training.config)]
    result = evaluate_logprobs(training.engine, pairs, training.inputs.pad_id, eval_batch(training.config))
    # Of a list its best and its worst response, which its first slot has.
    first = slice(None, None, inputs.held_out_slots)
    r_w, r_l = ((now - start)[first] for now, start in zip(result, training.start.probe, strict=True))
    has_w, has_l = present_in_pairs(pairs[first])
    return Probe(float(r_w[has_w].double().mean()), float(r_l[has_l].double().mean()))


def _initial_state(objective: Objective, inputs: Inputs, sampler: PairSampler) -> tuple[float, ...]:
    """The objective's batch statistics before the first step; the first global batch's lengths are known
    already."""
    sides = [side for idx in sampler.global_batch(0) for side in inputs.train[idx].sides]
    total = sum(side.num_scored for side in sides)
    return objective.initial_state(2 * total / len(sides))


def _num_tokens(inputs: Inputs, indices: list[int]) -> int:
    """Tokens of these training pairs, both sides, prompt and response, without padding."""
    return sum(side.num_tokens for idx in indices for side in inputs.train[idx].sides)


def _first_pass(
    config: ResolvedConfig, sampler: PairSampler, num_steps: int, calibrator: Calibrator
) -> list[Visit]:
    """The micro-batches of the first pass over the pairs, of all ranks, in bf16, where z depends on them."""
    if config.model.dtype != "bfloat16":
        return []
    visits = []
    for step in range(min(num_steps, sampler.steps_of(1))):
        kind = kind_at(config, calibrator, step)
        visits += [
            Visit(indices, kind.takes_joint_layouts, kind.takes_sides_apart)
            for indices in sampler.micro_batches(step, 0, 1, config.train.pairs_per_device)
        ]
    return visits


def _micro_batches(training: Training, measurement: Measurement) -> list[MicroBatch]:
    """This rank's micro-batches of the coming step, on the device."""
    apart = measurement.takes_sides_apart and training.config.model.dtype == "bfloat16"
    config, device = training.config, training.engine.device
    cut = training.sampler.micro_batches(
        training.state.step, rank(), world_size(), config.train.pairs_per_device
    )

    def lay(pairs: Sequence[TokenizedPair]) -> PairBatch:
        return lay_out(config.train, pairs, training.inputs.pad_id, measurement.takes_joint_layouts)

    micro_batches = []
    for indices in cut:
        pairs = [training.inputs.train[idx] for idx in indices]
        batch = lay(pairs)
        rows = training.reference.rows(indices, batch, apart)
        read = None if training.moving is None else training.moving.rows(indices, batch, apart)
        made = made_for(training.method.objective, pairs, batch, rows, training.inputs.pad_id, read)
        made = made.to(device)
        if pairs[0].scores is not None:
            made = with_lists(made, pairs, training.inputs.train.slots, lay)
        micro_batches.append(made)
    return micro_batches


def _mismatched(training: Training) -> list[MicroBatch]:
    """This rank's mismatched pairs of the coming step, on the device, in as many micro-batches of as many
    pairs."""
    config, inputs, device = training.config, training.inputs, training.engine.device
    mismatches = training.sampler.mismatches(training.state.step)
    widths = inputs.mismatched(mismatches, config).widths()
    micro_batches = []
    for which in dealt(mismatches, widths, rank(), world_size(), config.train.pairs_per_device):
        batch = lay_out(config.train, inputs.mismatched(which, config), inputs.pad_id, may_join=True)
        ref_w, ref_l = training.read_reference.mismatched_rows(which, batch)
        ref_w, ref_l = to_device(ref_w, device), to_device(ref_l, device)
        micro_batches.append(MicroBatch(batch.to(device), ref_w, ref_l, torch.ones_like(ref_w)))
    return micro_batches


def _start_sinks(config: ResolvedConfig, run: RunFolder, num_steps: int, start_step: int) -> list[Sink]:
    """The sinks, on rank 0 alone; rows that a crash left after the checkpoint are dropped, to be written
    again."""
    if rank() != 0:
        return []
    kept = start_step if start_step > 0 else -1
    run.rewind(kept)
    rewind_answers(run, kept)
    return build_sinks(config, run, num_steps, start_step)


def _further_row(training: Training, result: SideLogProbs) -> dict[str, float]:
    """Whether the policy looks at images, and what became of gold responses; nothing where there are none.
    Collective."""
    held_out, pad_id = training.inputs.held_out, training.inputs.pad_id
    run, size = training.run, eval_batch(training.config)
    against = training.config.metrics.vision_gain
    row = vision_row(training.engine, held_out, result, pad_id, size, against)
    return row | gold_row(training.engine, held_out, pad_id, size, lambda: run.rows(run.eval))


def _note_evaluation(
    training: Training, result: SideLogProbs, of_reference: SideLogProbs | None, looks: dict[str, float]
) -> None:
    """Displacement of the held-out pairs against step 0, their loss by the reference's z, and whether the
    policy `looks`, to every sink; per-pair results to the run folder."""
    if rank() != 0:
        return
    step, start, held_out = training.state.step, training.start, training.inputs.held_out
    num_probed, num_slots = training.config.calibration.probe_pairs, training.inputs.held_out_slots
    present = present_in_pairs(held_out)
    if num_slots > 1:
        lists = lists_of(held_out, num_slots)
        row = list_row(*result, start.z_w, start.z_l, lists, num_probed, start.noise)
    else:
        row = displacement_row(*result, start.z_w, start.z_l, num_probed, start.noise, present)
    method, numbers = training.method, training.state.objective_state
    loss = held_out_loss(
        method.objective, method.aggregate, numbers, held_out, result, of_reference, num_slots
    )
    if loss is not None:
        row["loss"] = loss
    of_pairs = SideLogProbs(*(z[::num_slots] for z in without_missing(result, present)))
    training.run.save_pair_results(step, of_pairs)
    for sink in training.sinks:
        sink.log_eval({"step": step} | row | looks)


def _finish(training: Training, reason: str | None, at_end: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Write final/, the plot, scores and the summary; `reason`: why the run ends early, if it does. The other
    ranks stay until rank 0 is through: a launcher may end what is left a while after the first rank has gone.
    Collective."""
    weights = training.engine.whole_weights()
    return done_by_rank_zero(lambda: _write_end(training, weights or {}, reason, at_end))


def _write_end(
    training: Training,
    weights: dict[str, torch.Tensor],
    reason: str | None,
    at_end: Callable[[], dict[str, float]],
) -> dict[str, Any]:
    run = training.run
    summary = summarize(run.rows(run.metrics), run.rows(run.eval)) | end_of_summary(training, reason)
    with replacing(run.final) as beside:
        save_model(training.engine.policy.model, weights, training.inputs.tokenizer, beside)
        (beside / "README.md").write_text(
            model_card(
                training.config,
                summary,
                run.shown(run.final),
                sees=sight_of(training.inputs.tokenizer) is not None,
            ),
            encoding="utf-8",
        )
    plot_run(run, run.plot)
    run.update_run(summary=summary)
    if scores := at_end():
        for sink in training.sinks:
            sink.log_scores(training.state.step, scores)
    for sink in training.sinks:
        sink.close(summary, 0)
    return summary
