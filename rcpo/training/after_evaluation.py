"""What follows an evaluation: a warning where the chosen responses have fallen, the weights of the best one,
and whether the run ends here.

Rank 0 decides by the rows of eval.jsonl, and the others hear of it: what a resumed run finds there is what an
unbroken one knew. Called by `rcpo.training.loop` on every rank.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from rcpo.common.errors import SaveError, first_line
from rcpo.common.files import replacing
from rcpo.config.conditions import PREFIX, Best, parse_best, parse_condition
from rcpo.models.load import save_model
from rcpo.monitor.model_card import model_card
from rcpo.monitor.summary import summarize
from rcpo.ranks.distributed import done_by_rank_zero, from_rank_zero, rank

if TYPE_CHECKING:
    from rcpo.training.state import Training

logger = logging.getLogger(__name__)


def after_evaluation(training: "Training") -> str | None:
    """Warn, keep the weights if they are the best, and say why the run ends, or None. Collective."""
    if rank() == 0:
        _alert_once(training)
    if training.config.train.keep_best is not None:
        _keep_if_best(training)
    return reason_to_end(training)


def reason_to_end(training: "Training") -> str | None:
    """Why train.stop_when ends the run at its step; None where that is the last one anyway, or the first is
    to come, or no evaluation has been made of it. Collective."""
    text, step = training.config.train.stop_when, training.state.step
    if text is None or step in (0, training.num_steps):
        return None
    return from_rank_zero(_reason(text, step, _rows(training)) if rank() == 0 else None)


def _reason(text: str, step: int, rows: Sequence[Mapping[str, float]]) -> str | None:
    condition = parse_condition(text)
    row = next((row for row in reversed(rows) if row["step"] == step), None)
    if row is None or not condition.holds(row):
        return None
    seen = ", ".join(f"{PREFIX}{key} was {row.get(key, math.nan):.4g}" for key in condition.names())
    return f"ended early at step {step}: train.stop_when={text}, and {seen}"


def _rows(training: "Training") -> list[dict[str, Any]]:
    return training.run.rows(training.run.eval)


def _alert_once(training: "Training") -> None:
    """Warn where the chosen responses are below tracking.alert_below; run.json keeps that it was done."""
    limit, run = training.config.tracking.alert_below, training.run
    if limit is None or "alert" in run.read_run():
        return
    row = _rows(training)[-1]
    chosen = row["displacement/chosen"]
    if not chosen < limit:
        return
    step = int(row["step"])
    run.update_run(alert={"step": step, "displacement/chosen": chosen})
    line = (
        f"the held-out chosen responses are at {chosen:+.4g} nats at step {step}, below "
        f"tracking.alert_below={limit:g}"
    )
    logger.warning("%s", line)
    for sink in training.sinks:
        sink.alert(step, line)


def best_row(rows: Sequence[dict[str, Any]], best: Best) -> dict[str, Any] | None:
    """The first of the best evaluations of trained weights; None where none has a finite number."""
    found = None
    for row in rows:
        value = row.get(best.key, math.nan)
        if row["step"] > 0 and math.isfinite(value) and (found is None or best.beats(value, found[best.key])):
            found = row
    return found


def _keep_if_best(training: "Training") -> None:
    """Write RUN/best where no evaluation so far was better. Collective."""
    step, best = training.state.step, parse_best(str(training.config.train.keep_best))
    row = from_rank_zero(best_row(_rows(training), best) if rank() == 0 else None)
    if row is None or row["step"] != step:
        return
    weights = training.engine.whole_weights()
    fault = done_by_rank_zero(lambda: _write_best(training, weights or {}, f"{PREFIX}{best.key}", row))
    if fault is None:
        return
    line = f"{training.run.best}: the weights of step {step} could not be written ({fault}); the older stay"
    if training.config.train.on_save_error == "stop":
        raise SaveError(line)
    logger.warning("%s, and the run goes on (train.on_save_error=continue)", line)


def _write_best(
    training: "Training", weights: dict[str, torch.Tensor], key: str, row: dict[str, Any]
) -> str | None:
    """What kept it from being written; on rank 0."""
    run, step, value = training.run, training.state.step, row[key.removeprefix(PREFIX)]
    summary = summarize(run.rows(run.metrics), _rows(training)) | {
        "best_key": key, "best_step": step, "best_value": value,
    }  # fmt: skip
    try:
        with replacing(run.best) as beside:
            save_model(training.engine.policy.model, weights, training.inputs.tokenizer, beside)
            card = model_card(training.config, summary, run.shown(run.best))
            (beside / "README.md").write_text(card, encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:
        return str(getattr(error, "strerror", None) or first_line(error))
    run.update_run(best={"step": step, "key": key, "value": value})
    logger.info("kept the weights of step %d in %s: %s is %.4g", step, run.best, key, value)
    return None


def end_of_summary(training: "Training", reason: str | None) -> dict[str, Any]:
    """What the summary has beside its numbers; on rank 0."""
    found: dict[str, Any] = {} if reason is None else {"stopped_early": reason}
    if training.config.train.keep_best is None:
        return found
    kept = training.run.read_run().get("best")
    if isinstance(kept, dict):
        found |= {"best_key": kept["key"], "best_step": kept["step"], "best_value": kept["value"]}
    row = best_row(_rows(training), parse_best(str(training.config.train.keep_best)))
    if row is not None and row["step"] != found.get("best_step"):
        logger.warning(
            "the best evaluation is that of step %d, whose weights are gone; RUN/best has those of step %s",
            row["step"], found.get("best_step"),
        )  # fmt: skip
    return found
