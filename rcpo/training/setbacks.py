"""What the training loop does when a step cannot be trusted, a checkpoint cannot be written, or the machine
is wanted back. All of it is collective; called by `rcpo.training.loop`.
"""

import logging
import time
from typing import TYPE_CHECKING

from rcpo.common.errors import NonFiniteError, SaveError, StoppedError
from rcpo.ranks import stopping
from rcpo.ranks.distributed import gather, rank, world_size
from rcpo.training.step import NonFiniteStepError

if TYPE_CHECKING:
    from rcpo.training.state import Training

logger = logging.getLogger(__name__)


def skip_or_stop(training: "Training", error: NonFiniteStepError) -> dict[str, float]:
    """After a step whose numbers are not finite: leave it out as train.on_nonfinite says, and return its row.

    run.json lists step, rank and the pairs' rows in the data. Raises NonFiniteError when the run stops; a
    checkpoint of the weights before that step is there then.
    """
    config, state = training.config.train, training.state
    step = state.step + 1
    found = [
        {"step": step, "rank": number, "rows": rows}
        for number, rows in enumerate(gather(_rows_of(training, error.lost)))
        if rows
    ]
    if rank() == 0:
        known = training.run.read_run().get("nonfinite", [])
        training.run.update_run(nonfinite=[*known, *found])
    place = "; ".join(f"rank {item['rank']}, rows {item['rows']} of the data" for item in found)
    seen = f"step {step}: a loss, log-probability or gradient is not finite ({place})"
    if config.on_nonfinite == "skip" and state.num_nonfinite_steps < config.max_nonfinite_steps:
        logger.warning("%s; the step is left out", seen)
        training.engine.skip_step()
        state.step, state.num_nonfinite_steps = step, state.num_nonfinite_steps + 1
        return error.row | state.calibrator.counts()
    kept = f"the weights are those of step {step - 1}"
    try:
        training.save()
        kept += ", and a checkpoint has them"
    except SaveError as fault:
        logger.error("%s", fault)
    if config.on_nonfinite == "skip":
        rule = f"train.max_nonfinite_steps={config.max_nonfinite_steps} steps were left out before"
    else:
        rule = f"`rcpo resume {training.run.path} --allow-change train.on_nonfinite=skip` leaves the step out"
    raise NonFiniteError(f"{seen}; {kept}; train again with a smaller optim.lr or without those rows; {rule}")


def _rows_of(training: "Training", lost: list[int]) -> list[int]:
    """Row numbers in the source of the pairs in these micro-batches of the current step."""
    per_device = training.config.train.pairs_per_device
    batches = list(training.sampler.micro_batches(training.state.step, rank(), world_size(), per_device))
    rows = [training.inputs.train[idx].row for number in lost for idx in batches[number]]
    return list(dict.fromkeys(rows))


def save_or_go_on(training: "Training", time_left: stopping.TimeLeft) -> None:
    """Write a checkpoint, and take note of its time; where it fails, warn, or raise SaveError, as
    train.on_save_error says."""
    started = time.perf_counter()
    try:
        training.save()
    except SaveError as error:
        if training.config.train.on_save_error == "stop":
            raise
        logger.warning("%s; the run goes on (train.on_save_error=continue)", error)
        return
    warning = time_left.note_save(time.perf_counter() - started)
    if warning is not None:
        logger.warning("%s", warning)


def stop_with_checkpoint(training: "Training", is_time_up: bool = False) -> None:
    """Raise StoppedError, after a checkpoint."""
    step, path = training.state.step, training.run.path
    name = stopping.signal_name("the end of the job's time" if is_time_up else "SIGTERM")
    seen = f"stopped by {name} after step {step} of {training.num_steps}"
    try:
        training.save()
    except SaveError as error:
        raise StoppedError(f"{seen}, without a checkpoint: {error}") from None
    raise StoppedError(f"{seen}, with a checkpoint; `rcpo resume {path}` goes on")
