"""The end of a run: final/ with its card, the plot, the summary and scores. Called by `rcpo.training.loop` on
every rank."""

from collections.abc import Callable
from typing import Any

import torch

from rcpo.common.files import replacing
from rcpo.data.pictures import sight_of
from rcpo.models.load import save_model
from rcpo.monitor.model_card import model_card
from rcpo.monitor.plot import plot_run
from rcpo.monitor.summary import summarize
from rcpo.ranks.distributed import done_by_rank_zero
from rcpo.training.after_evaluation import end_of_summary
from rcpo.training.state import Training


def finish(training: Training, reason: str | None, at_end: Callable[[], dict[str, float]]) -> dict[str, Any]:
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
