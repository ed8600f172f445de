"""The config of what a model is asked: the group `evaluation`, at a run's end by train.evaluate, or by
`rcpo evaluate`. `rcpo.config.schema` has it as a section; defaults stand in conf/. Imports no torch."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from rcpo.common.conf import IN_CONF, defaults_in
from rcpo.common.errors import UserError
from rcpo.config.types import STRICT, Positive, Text

YES_NO = "yes_no"
OWN = ("arithmetic", YES_NO)
"""Tasks that need no package and no network; all others are lm-eval's, or of a folder of the user's."""
ASKS_TEXT = ("arithmetic",)
"""Tasks that models for images and text alone are not asked."""
OF_QUESTIONS = (
    "questions", "questions_images", "questions_split", "questions_config", "questions_revision",
)  # fmt: skip
"""Keys that are of yes_no alone."""
DEFAULT = "word_problems"


@dataclass(frozen=True, config=STRICT)
@defaults_in("evaluation/word_problems")
class EvaluationConfig:
    name: Text = IN_CONF
    tasks: Annotated[list[Text], Field(min_length=1)] = IN_CONF
    """Names: arithmetic (the held-out word problems), yes_no (your questions), lm-eval's, or those of
    tasks_dir."""
    tasks_dir: Text | None = IN_CONF
    """Folder of lm-eval's task files (YAML) of your own; with local data they need no network."""
    limit: Positive | None = IN_CONF
    """Only so many of the first questions of yes_no and of lm-eval's tasks; null: all."""
    chat: bool = IN_CONF
    """Ask lm-eval's questions as user turns."""
    batch: Positive = IN_CONF
    """Prompts at once."""
    questions: Text | None = IN_CONF
    """Of yes_no: a file, a glob, a folder of `datasets` or a hub id with a row a question, as POPE has them:
    text (or question), label (or answer), which is yes or no, and image, whose path is relative to the file.
    Scores are of each category too, where a column says which, or several files do."""
    questions_images: Text | None = IN_CONF
    """Folder that the images' paths are relative to; null: that of the file."""
    questions_split: Text | None = IN_CONF
    """Which split of such a data set; null: the only one."""
    questions_config: Text | None = IN_CONF
    """Which config of such a data set, where it has several."""
    questions_revision: Text | None = IN_CONF
    """Branch, tag or commit of a hub id in questions; null: main. The run keeps the commit."""

    @property
    def folder(self) -> Path | None:
        return None if self.tasks_dir is None else Path(self.tasks_dir)


def refuse_missing_harness(tasks: Sequence[str], what: str, instead: str) -> None:
    """Raise UserError where a task is lm-eval's and lm-eval is not here; `what` asks for it."""
    if any(task not in OWN for task in tasks) and importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{what}: needs lm-eval; type pip install 'rcpo[evaluate]', or {instead}")


def check_option(asked: str | None, option: str) -> None:
    """Raise UserError where train.evaluate does not name the option that the section is of."""
    if asked is None and option != DEFAULT:
        raise UserError(
            f"evaluation={option}: is asked by nothing; type train.evaluate={option}, or leave it out"
        )
    if asked is not None and asked != option:
        raise UserError(
            f"train.evaluate={asked}: the option of the group evaluation is named {option}; type "
            f"evaluation={asked} as well, and write name: {asked} into a file of your own"
        )
