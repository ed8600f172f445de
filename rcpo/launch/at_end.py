"""The tasks of train.evaluate: checked before a run starts, asked at its end on rank 0, with final/ there.

Whatever goes wrong at the end, the run is done: one warning says what to type. Called by `rcpo.launch.start`
and `rcpo.launch.worker`; the results are `rcpo.evaluation`'s."""

import logging
import shlex
from collections.abc import Callable

import torch

from rcpo.common.errors import UserError, first_line
from rcpo.config.evaluation import OF_QUESTIONS, EvaluationConfig, refuse_missing_harness
from rcpo.config.resolved import ResolvedConfig
from rcpo.ranks.stopping import interrupting
from rcpo.runs.folder import RunFolder

logger = logging.getLogger(__name__)


def check_tasks(config: ResolvedConfig) -> None:
    """Raise UserError where a task of train.evaluate needs a package that is not here, is none of lm-eval's,
    cannot be loaded with its data or questions, or cannot be asked of the run's model."""
    asked, name = config.evaluation, config.train.evaluate
    if name is None or (asked.tasks == ["arithmetic"] and asked.questions is None):
        return
    refuse_missing_harness(asked.tasks, f"train.evaluate={name}", "train.evaluate=word_problems")
    from rcpo.evaluation.subject import start_of
    from rcpo.evaluation.tasks import Evaluation

    try:
        evaluation, start = Evaluation(asked), start_of(config)
        for task in evaluation.tasks:
            evaluation.refuse(start, task)
    except UserError as error:
        raise UserError(f"train.evaluate={name}: {error}") from None


def scores_at_end(config: ResolvedConfig, run: RunFolder) -> Callable[[], dict[str, float]] | None:
    """What `rcpo.training.loop` calls with final/ written: values by task, none where something went wrong;
    None where nothing is asked."""
    return None if config.train.evaluate is None else lambda: _scores(config, run)


def _scores(config: ResolvedConfig, run: RunFolder) -> dict[str, float]:
    try:
        with interrupting():
            return _asked(config, run)
    except (Exception, KeyboardInterrupt) as error:
        logger.warning(
            "train.evaluate=%s: not evaluated (%s); the run is done: type %s",
            config.train.evaluate,
            first_line(error),
            _command(config.evaluation, run),
        )
        return {}


def _command(asked: EvaluationConfig, run: RunFolder) -> str:
    """The words that ask the same later."""
    given = {"tasks": ",".join(asked.tasks), "tasks_dir": asked.tasks_dir, "limit": asked.limit}
    given |= {key: getattr(asked, key) for key in OF_QUESTIONS}
    given["chat"] = "yes" if asked.chat else None
    words = [f"{key}={value}" for key, value in given.items() if value is not None]
    return shlex.join(["rcpo", "evaluate", run.shown(run.path), *words])


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
