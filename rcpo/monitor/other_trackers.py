"""TensorBoard and Trackio beside W&B, each through its own library: tracking=tensorboard, tracking=trackio.

Rows go as they are at `step`, evaluations under `eval/`, scores on tasks under `downstream/`, as W&B gets
them; console output, code and machine statistics never. A tracker that fails is one warning and never stops
training. Built by `rcpo.monitor.sinks` on rank 0 alone; the libraries are extras, imported where they are
used.
"""

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from rcpo.common.errors import UserError
from rcpo.runs.answers import Answer
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree

if TYPE_CHECKING:
    from rcpo.config.resolved import ResolvedConfig

logger = logging.getLogger(__name__)

LIBRARIES = ("tensorboard", "trackio")
"""Names of tracking=NAME, of the package and of the extra."""
ALERT = "chosen responses are falling"
"""Title of an alert."""
SCORES = "downstream/"
"""Before the name of a task."""


def refuse_missing_tracker(name: str) -> None:
    """Raise UserError where tracking=`name` needs a library that is not here."""
    if name in LIBRARIES and importlib.util.find_spec(name) is None:
        raise UserError(
            f"tracking={name}: needs the {name} package; type pip install 'rcpo[{name}]', or tracking=none"
        )


class _Guarded:
    """Calls of a library; after the first that fails, which is said once, there are none."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._is_lost = False

    def _attempt(self, call: Callable[[], object]) -> None:
        if self._is_lost:
            return
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                call()
        except Exception as error:
            self._is_lost = True
            first = (str(error).strip().splitlines() or [""])[0]
            logger.warning(
                "%s failed (%s: %s); going on without it; metrics.jsonl and eval.jsonl have every row",
                self._what, type(error).__name__, first,
            )  # fmt: skip


def _named(row: dict[str, float], prefix: str = "") -> dict[str, float]:
    return {f"{prefix}{key}": value for key, value in row.items() if key != "step"}


class TensorBoardSink(_Guarded):
    """Event files in RUN/tensorboard. What a resumed run writes again replaces what was there."""

    def __init__(self, config: "ResolvedConfig", run: RunFolder, start_step: int) -> None:
        super().__init__("TensorBoard")
        self._config, self._run = config, run
        self._attempt(lambda: self._open(start_step))

    def _open(self, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self._run.path / "tensorboard"
        # From the first step that is written now on; 0 is an evaluation.
        first = start_step + 1 if start_step > 0 else 0
        self._writer = SummaryWriter(str(folder), purge_step=first if folder.exists() else None)
        if not start_step:
            text = yaml.safe_dump(config_tree(self._config), sort_keys=False)
            self._writer.add_text("config", f"```yaml\n{text}```", 0)

    def log_step(self, row: dict[str, float]) -> None:
        self._attempt(lambda: self._add(_named(row), int(row["step"])))

    def log_eval(self, row: dict[str, float]) -> None:
        self._attempt(lambda: self._add(_named(row, "eval/"), int(row["step"])))
        self._attempt(lambda: self._writer.flush())

    def _add(self, named: dict[str, float], step: int) -> None:
        for key, value in named.items():
            self._writer.add_scalar(key, value, step)

    def log_answers(self, answers: Sequence[Answer]) -> None:
        for each in answers:
            quoted = "\n\n".join(
                f"**{name}**\n\n```text\n{text}\n```"
                for name, text in (("prompt", each.prompt), ("initial", each.initial), ("now", each.now))
            )
            self._attempt(lambda: self._writer.add_text(f"answers/{each.pair}", quoted, each.step))  # noqa: B023

    def log_scores(self, step: int, scores: dict[str, float]) -> None:
        self._attempt(lambda: self._add(_named(scores, SCORES), step))

    def alert(self, step: int, line: str) -> None:
        self._attempt(lambda: self._writer.add_text("alert", line, step))

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        self._attempt(lambda: self._writer.close())


class TrackioSink(_Guarded):
    """One run of that name in the project tracking.project: in Trackio's folder, or in the Space or on the
    server that its variables name. A resumed run goes on in it; steps that it makes again stand there twice,
    with the same numbers."""

    def __init__(self, config: "ResolvedConfig", start_step: int) -> None:
        super().__init__("Trackio")
        self._attempt(lambda: self._open(config, start_step))

    def _open(self, config: "ResolvedConfig", start_step: int) -> None:
        import trackio

        self._trackio_run = trackio.init(
            project=config.tracking.project,
            name=config.name,
            group=config.tracking.group,
            config=config_tree(config),
            resume="allow" if start_step > 0 else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log_step(self, row: dict[str, float]) -> None:
        self._attempt(lambda: self._trackio_run.log(_named(row), step=int(row["step"])))

    def log_eval(self, row: dict[str, float]) -> None:
        self._attempt(lambda: self._trackio_run.log(_named(row, "eval/"), step=int(row["step"])))

    def log_answers(self, answers: Sequence[Answer]) -> None:
        def send() -> None:
            import pandas
            import trackio

            table = trackio.Table(dataframe=pandas.DataFrame(answers))
            self._trackio_run.log({"answers": table}, step=answers[0].step)

        self._attempt(send)

    def log_scores(self, step: int, scores: dict[str, float]) -> None:
        self._attempt(lambda: self._trackio_run.log(_named(scores, SCORES), step=step))

    def alert(self, step: int, line: str) -> None:
        self._attempt(lambda: self._trackio_run.alert(ALERT, line, step=step))

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        def finish() -> None:
            import trackio

            trackio.finish()

        self._attempt(finish)
