"""Where a run's numbers go while it runs: metrics.jsonl and eval.jsonl always, the console, and W&B,
TensorBoard or Trackio.

Owns which sinks a run has, and the files. Does not own what rows hold (`rcpo.method.metrics`), how they are
shown (`rcpo.common.console`) or sent (`rcpo.monitor.tracking`,
`rcpo.monitor.other_trackers`). Built and called by `rcpo.training.loop` on
rank 0 alone. The files are the truth: a console that has gone away or a W&B that fails never stops training.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from rcpo.common.console import RunConsole
from rcpo.config.resolved import ResolvedConfig
from rcpo.monitor.other_trackers import TensorBoardSink, TrackioSink
from rcpo.monitor.step_line import ConsoleSink
from rcpo.monitor.tracking import WandbSink, wandb_mode
from rcpo.runs.answers import Answer
from rcpo.runs.folder import RunFolder
from rcpo.runs.rows import encode_row


class Sink(Protocol):
    """Takes rows as they are made."""

    def log_step(self, row: dict[str, float]) -> None:
        """One optimizer step; `step` counts optimizer steps done, from 1."""

    def log_eval(self, row: dict[str, float]) -> None:
        """One evaluation on the held-out pairs: `step`, `displacement/*`, `logps/*` and `loss` without a
        prefix."""

    def log_answers(self, answers: Sequence[Answer]) -> None:
        """Answers of one evaluation, or of the start, beside those of the start."""

    def log_scores(self, step: int, scores: dict[str, float]) -> None:
        """Of the trained model on tasks, by task, at the end."""

    def alert(self, step: int, line: str) -> None:
        """What a user should hear of wherever he looks, once in a run."""

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        """The last call; `summary` is `rcpo.monitor.summary.summarize`'s, empty when the run did not get that
        far."""


def build_sinks(config: ResolvedConfig, run: RunFolder, num_steps: int, start_step: int) -> list[Sink]:
    """The sinks of a run that goes on from `start_step` optimizer steps done to `num_steps`."""
    sinks: list[Sink] = [JsonlSink(run)]
    mode = wandb_mode(config.tracking)
    if mode != "disabled":
        sinks.append(WandbSink(config, run, mode))
    if config.tracking.name == "tensorboard":
        sinks.append(TensorBoardSink(config, run, start_step))
    if config.tracking.name == "trackio":
        sinks.append(TrackioSink(config, start_step))
    return [*sinks, ConsoleSink(RunConsole(), num_steps, start_step, config.train.log_every)]


def send_scores(config: ResolvedConfig, run: RunFolder, step: int, scores: dict[str, float]) -> None:
    """Scores on tasks that were found when the run had ended, after `step` steps, to the run's tracker: as a
    part of the run that is there, as if it had been resumed."""
    sinks: list[Sink] = []
    mode = wandb_mode(config.tracking)
    if mode != "disabled":
        sinks.append(WandbSink(config, run, mode, is_over=True))
    if config.tracking.name == "tensorboard":
        sinks.append(TensorBoardSink(config, run, step + 1))
    if config.tracking.name == "trackio":
        sinks.append(TrackioSink(config, step + 1))
    for sink in sinks:
        sink.log_scores(step, scores)
        sink.close({}, 0)


class JsonlSink:
    """RUN/metrics.jsonl and RUN/eval.jsonl: appends one line a row, flushed at once. `RunFolder.rows` reads
    them."""

    def __init__(self, run: RunFolder) -> None:
        self._metrics = run.metrics.open("a", encoding="utf-8")
        self._eval = run.eval.open("a", encoding="utf-8")

    def log_step(self, row: dict[str, float]) -> None:
        self._metrics.write(encode_row(row) + "\n")
        self._metrics.flush()

    def log_eval(self, row: dict[str, float]) -> None:
        self._eval.write(encode_row(row) + "\n")
        self._eval.flush()

    def log_answers(self, answers: Sequence[Answer]) -> None:
        """RUN/answers.jsonl has them."""

    def log_scores(self, step: int, scores: dict[str, float]) -> None:
        """RUN/evaluation.json has them."""

    def alert(self, step: int, line: str) -> None:
        """run.json has it."""

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        self._metrics.close()
        self._eval.close()
