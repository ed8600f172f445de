"""Questions that yes or no answers, read from where they lie, as POPE has them (Li et al. 2023, arXiv
2305.10355): its own rows, {"question_id", "image", "text", "label"}, or with `question` and `answer` in the
place of text and label, from files, folders and data sets of the hub, which are of one commit.

Questions have categories (POPE's random, popular, adversarial) where a column `category` says which, or where
they come from several files or splits. Does not ask them (`rcpo.evaluation.yes_no`)."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError
from rcpo.config.evaluation import YES_NO, EvaluationConfig
from rcpo.evaluation.prompts import MEGAPIXELS, Prompt
from rcpo.records.arithmetic import user_turn
from rcpo.records.hub import QUESTIONS_REVISION, commit_of_questions
from rcpo.records.images import COLUMNS, Image, refuse_missing, with_images
from rcpo.records.places import Place
from rcpo.records.readers import Rows, read_rows
from rcpo.records.record import BadRowError, PreferenceRecord

TEXTS, LABELS = ("text", "question"), ("label", "answer")
"""Names of columns: POPE's own, and those of its data sets on the hub."""
CATEGORY = "category"


@dataclass(frozen=True)
class Question:
    """What is asked."""

    text: str
    is_yes: bool
    """The right answer."""
    prompt: Prompt
    category: str | None = None


@dataclass(frozen=True)
class QuestionSet:
    """All questions of a run of `rcpo evaluate`."""

    questions: Sequence[Question]
    where: str
    """What the user typed for them, for errors."""
    source: str | None
    """ID@COMMIT of a data set of the hub."""

    @property
    def have_images(self) -> bool:
        return any(question.prompt.images for question in self.questions)

    @functools.cached_property
    def digest(self) -> str:
        """Of texts, labels, images and categories."""
        images: dict[str, str] = {}

        def of(image: Image) -> str:
            if image.identity not in images:
                images[image.identity] = image.digest()
            return images[image.identity]

        parts = [
            [each.text, each.is_yes, *map(of, each.prompt.images), *filter(None, [each.category])]
            for each in self.questions
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_questions(config: EvaluationConfig) -> QuestionSet:
    """Raises UserError where they cannot be read: no file, no such column, a label that is neither yes nor
    no, an image that is not there."""
    if config.questions is None:
        raise UserError(f"tasks={YES_NO}: has no questions of its own; type questions=FILE.jsonl as well")
    place = Place(
        config.questions, config.questions_split, "questions", "questions_split", config.questions_config,
        "questions_config", config.questions_revision, QUESTIONS_REVISION,
    )  # fmt: skip
    folder = _folder(config)
    rows = read_rows(place, {*TEXTS, *LABELS, *COLUMNS, CATEGORY})
    text, label = (_column(names, rows, place) for names in (TEXTS, LABELS))
    found = []
    for number, row in zip(rows.numbers[: config.limit], rows.rows, strict=False):
        try:
            found.append(_question(row, text, label, number, rows, folder))
        except BadRowError as error:
            raise UserError(
                f"{_where(config)}: {rows.where(number)}: {error}; mend it or leave it out"
            ) from None
    if folder is not None and not any(image.path for each in found for image in each.prompt.images):
        raise UserError(
            f"questions_images={config.questions_images}: the images are in the rows, or there are none; "
            "leave it out"
        )
    return QuestionSet(found, _where(config), _source(config))


def _where(config: EvaluationConfig) -> str:
    return f"questions={config.questions}"


def _folder(config: EvaluationConfig) -> Path | None:
    if config.questions_images is None:
        return None
    folder = Path(config.questions_images).expanduser()
    if not folder.is_dir():
        raise UserError(f"questions_images={config.questions_images}: is no folder; give that of the images")
    return folder


def _source(config: EvaluationConfig) -> str | None:
    commit = commit_of_questions(config)
    return None if commit is None else f"{config.questions}@{commit}"


def _column(names: Sequence[str], rows: Rows, place: Place) -> str:
    for name in names:
        if name in rows.columns:
            return name
    known = ", ".join(map(str, rows.columns))
    raise place.error(f"has neither a column {' nor '.join(names)}, but {known}; rename one")


def _question(
    row: dict[str, Any], text: str, label: str, number: int, rows: Rows, folder: Path | None
) -> Question:
    """Raises BadRowError."""
    asked, right = row.get(text), row.get(label)
    if not isinstance(asked, str) or not asked.strip():
        raise BadRowError(f"its {text} is no text")
    said = right.strip().casefold() if isinstance(right, str) else right
    if said not in ("yes", "no"):
        raise BadRowError(f"its {label} is {right!r}, which is neither yes nor no")
    record = PreferenceRecord(user_turn(asked), [], [], number)
    record = with_images(record, row, lambda: folder or rows.folder_of(number), MEGAPIXELS)
    refuse_missing(record.images)
    named = row.get(CATEGORY)
    category = named if isinstance(named, str) and named else rows.part_of(number)
    return Question(asked, said == "yes", Prompt(record.prompt, images=record.images), category)
