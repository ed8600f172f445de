"""The tasks of train.evaluate: checked before a run starts, asked at its end on rank 0, with final/ there.

Whatever goes wrong at the end, the run is done: one warning says what to type. Called by `rcpo.launch.start`
and `rcpo.launch.worker`; the results are `rcpo.evaluation`'s."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import torch

from rcpo.common.errors import UserError
from rcpo.config.evaluation import OWN, refuse_missing_harness
from rcpo.config.resolved import ResolvedConfig
from rcpo.ranks.stopping import SIGNALS
from rcpo.runs.folder import RunFolder

logger = logging.getLogger(__name__)


def check_tasks(config: ResolvedConfig) -> None:
    """Raise UserError where a task of train.evaluate needs a package that is not here, is none of lm-eval's,
    or cannot be loaded with its data."""
    asked, name = config.evaluation, config.train.evaluate
    if name is None or set(asked.tasks) <= set(OWN):
        return
    refuse_missing_harness(asked.tasks, f"train.evaluate={name}", "train.evaluate=word_problems")
    from rcpo.evaluation.tasks import Evaluation

    try:
        Evaluation(asked)
    except UserError as error:
        raise UserError(f"train.evaluate={name}: {error}") from None


def scores_at_end(config: ResolvedConfig, run: RunFolder) -> Callable[[], dict[str, float]] | None:
    """What `rcpo.training.loop` calls with final/ written: values by task, none where something went wrong;
    None where nothing is asked."""
    return None if config.train.evaluate is None else lambda: _scores(config, run)


def _scores(config: ResolvedConfig, run: RunFolder) -> dict[str, float]:
    try:
        with _interrupted_by_signals():
            return _asked(config, run)
    except (Exception, KeyboardInterrupt) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning(
            "train.evaluate=%s: not evaluated (%s); the run is done: type rcpo evaluate %s tasks=%s%s",
            config.train.evaluate, lines[0][:200], run.shown(run.path), ",".join(config.evaluation.tasks),
            "" if config.evaluation.tasks_dir is None else f" tasks_dir={config.evaluation.tasks_dir}",
        )  # fmt: skip
        return {}


def _asked(config: ResolvedConfig, run: RunFolder) -> dict[str, float]:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from rcpo.evaluation.subject import find_subject
    from rcpo.evaluation.tasks import Evaluation, with_initial

    unset_hf_deepspeed_config()  # of ZeRO 3: a model would be loaded in parts, by all ranks together
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    evaluation = Evaluation(config.evaluation)
    subjects = with_initial([find_subject(str(run.path))])
    *_, found = [evaluation.of(subject, False, logger.info) for subject in subjects]
    return {task: result.main[1].value for task, result in found.items()}


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """While open, a signal that asks the run to stop ends what happens inside, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise InterruptedError(f"stopped by {signal.Signals(number).name}")

    is_main = threading.current_thread() is threading.main_thread()
    saved = [(number, signal.getsignal(number)) for number in SIGNALS]
    try:
        for number in SIGNALS if is_main else ():
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in saved if is_main else ():
            signal.signal(number, handler)
