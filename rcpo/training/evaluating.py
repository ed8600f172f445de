"""The held-out pairs, at step 0 and wherever an evaluation is due: displacement, their loss, whether the
policy looks at images, its answers; and the probe that `balance` steers by.

Owns what an evaluation is made of and which sinks and files hear of it. Called by `rcpo.training.loop` on
every rank.
"""

from rcpo.data.lists import lists_of
from rcpo.data.pairs import SideLogProbs, present_in_pairs, without_missing
from rcpo.method.metrics import displacement_row, list_row
from rcpo.method.statistics import Probe
from rcpo.models.evaluation import eval_batch, evaluate_logprobs
from rcpo.ranks.distributed import from_rank_zero, rank
from rcpo.training.after_evaluation import after_evaluation
from rcpo.training.answers import note_answers
from rcpo.training.gold import gold_row
from rcpo.training.held_out_loss import held_out_loss
from rcpo.training.looking import vision_row
from rcpo.training.state import Training


def evaluate_start(training: Training) -> None:
    """The evaluation of step 0, of log-probs that are there already: displacement is 0. Collective."""
    start = training.start
    result = SideLogProbs(start.z_w, start.z_l)
    _note_evaluation(training, result, start.reference, _further_row(training, result))
    note_answers(training)


def is_due(step: int, every: int) -> bool:
    """Whether something happens after optimizer step `step` (counted from 1); never with every = 0."""
    return every > 0 and step % every == 0


def evaluate(training: Training) -> str | None:
    """Displacement of the held-out pairs, to every sink; why the run ends with it, if it does. Collective."""
    pairs, pad_id = training.inputs.held_out, training.inputs.pad_id
    result = evaluate_logprobs(training.engine, pairs, pad_id, eval_batch(training.config))
    of_reference = training.start.reference
    if training.moving is not None:
        of_reference = training.moving.logprobs(pairs, eval_batch(training.config))
    _note_evaluation(training, result, of_reference, _further_row(training, result))
    note_answers(training)
    return after_evaluation(training)


def lacks_evaluation(training: Training) -> bool:
    """Whether a resumed run has none of the step that it goes on from, and one is due there. Collective."""
    step, run = training.state.step, training.run
    if step == 0 or step == training.num_steps or not is_due(step, training.config.train.eval_every):
        return False
    return bool(from_rank_zero(rank() == 0 and all(row["step"] != step for row in run.rows(run.eval))))


def evaluate_probe(training: Training) -> Probe:
    """Displacement of the probe pairs, the first of the held-out ones. Collective."""
    inputs = training.inputs
    pairs = inputs.held_out[: inputs.num_probed(training.config)]
    result = evaluate_logprobs(training.engine, pairs, training.inputs.pad_id, eval_batch(training.config))
    # Of a list its best and its worst response, which its first slot has.
    first = slice(None, None, inputs.held_out_slots)
    r_w, r_l = ((now - start)[first] for now, start in zip(result, training.start.probe, strict=True))
    has_w, has_l = present_in_pairs(pairs[first])
    return Probe(float(r_w[has_w].double().mean()), float(r_l[has_l].double().mean()))


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
