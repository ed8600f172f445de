"""`rcpo weigh ROWS`: how likely each response is of the target distribution, for DoRA's weights."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from rcpo.commands.flags import Flags, check_writable
from rcpo.commands.settings import Setting, add_settings, number_in, one_of, split_words, whole_number
from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically

COLUMNS = {"chosen": "probability_chosen", "rejected": "probability_rejected"}
RESPONSES, PROBABILITIES = "responses", "probabilities"
"""Of a row that is a list of responses."""
SETTINGS = (
    Setting("out", "a .jsonl file for the rows with the new columns; beside it .png, the reliability", Path),
    Setting("source", "column: where a row's responses come from, or a list's each (default: source)"),
    Setting("chosen_source", "in its place, the column of the chosen response's source"),
    Setting("rejected_source", "and of the rejected one's"),
    Setting("target", "the source to be like: its value in that column"),
    Setting("encoder", "a model folder or hub id: its mean hidden states instead of hashed n-grams"),
    Setting("calibration", "platt (default) or isotonic", one_of(("platt", "isotonic")), "platt",
            ("platt", "isotonic")),
    Setting("folds", "how many parts the rows are cut into (default: 5)", whole_number(2), 5),
    Setting("gamma", "prior ratio, others : target (default: as in the rows)", number_in(1e-6, 1e6)),
    Setting("seed", "of the folds (default: 0)", whole_number(0), 0),
)  # fmt: skip


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Train a classifier of where responses come from, and write what it thinks of each: the columns
probability_chosen and probability_rejected, or probabilities where rows are lists of responses, for
objective.sample_weight=dora_mean (DoRA, arXiv 2504.05831). Probabilities are out of fold,
calibrated, and as if all sources were equally common. Rows whose source is null get the mean of
all folds. Needs pip install 'rcpo[weigh]'."""
    parser.epilog = """\
examples:
  rcpo weigh PAIRS.jsonl target=human out=weighed.jsonl
  rcpo weigh PAIRS.jsonl chosen_source=c rejected_source=r target=human encoder=MODEL out=weighed.jsonl
  rcpo train data=file data.path=weighed.jsonl objective.sample_weight=dora_mean objective.aggregate=kl_dro"""
    add_settings(parser, SETTINGS, "FILE")


def run(options: argparse.Namespace) -> int:
    """Weigh; returns the exit code. Raises UserError for bad input, before anything is written."""
    places, settings = split_words(options.words, SETTINGS)
    if len(places) != 1:
        raise UserError(f"{' '.join(places) or 'nothing'}: give one file of rows; `rcpo weigh --help`")
    names = _check(settings)
    from rcpo.evaluation.json_rows import json_rows

    rows = json_rows(Path(places[0]), places[0])
    texts, labels, nums = _responses(rows, places[0], names, settings)
    import numpy as np

    from rcpo.quality.reliability import plot_reliability
    from rcpo.quality.source import at_equal_shares, features_of, out_of_fold, reliability

    is_target, of_row = np.array(labels), np.repeat(np.arange(len(rows)), nums)
    features = features_of(texts, settings.encoder)
    p = out_of_fold(features, is_target, of_row, settings.folds, settings.calibration, settings.seed)
    num_target, num_others = int((is_target == 1).sum()), int((is_target == 0).sum())
    gamma = num_others / num_target if settings.gamma is None else settings.gamma
    found = reliability(p[is_target >= 0], is_target[is_target >= 0])
    weighed = np.split(at_equal_shares(p, gamma), np.cumsum(nums)[:-1])
    lines = [
        json.dumps(row | _columns(row, of_one.tolist()), ensure_ascii=False) + "\n"
        for row, of_one in zip(rows, weighed, strict=True)
    ]
    picture = settings.out.with_suffix(".png")
    try:
        write_atomically(settings.out, "".join(lines))
        plot_reliability(found, picture)
    except OSError as error:
        raise UserError(f"out={settings.out}: cannot be written ({error.strerror})") from None
    unknown = len(labels) - num_target - num_others
    print(
        f"{len(labels)} responses of {len(rows)} rows: {num_target} of {settings.target}, {num_others} of "
        f"others, {unknown} of unknown source; gamma {gamma:.4g}"
    )
    print(f"out of fold: AUC {found.auc:.3f}, ECE {found.ece:.4f} ({settings.calibration})")
    print(f"wrote {settings.out} and {picture}")
    return 0


def _check(settings: argparse.Namespace) -> tuple[str, str]:
    """The columns of both responses' sources."""
    for name in ("out", "target"):
        if getattr(settings, name) is None:
            raise UserError(f"{name}: is missing; type {name}={'FILE.jsonl' if name == 'out' else 'VALUE'}")
    if settings.out.suffix != ".jsonl":
        raise UserError(f"out={settings.out}: must end in .jsonl; type out={settings.out.stem}.jsonl")
    for path in (settings.out, settings.out.with_suffix(".png")):
        if path.exists():
            raise UserError(f"out={settings.out}: {path} is there already; give another name")
        check_writable("out", path)
    if (settings.chosen_source is None) != (settings.rejected_source is None):
        raise UserError("chosen_source and rejected_source: give both, or source")
    if settings.source is not None and settings.chosen_source is not None:
        raise UserError(f"source={settings.source}: leave it out beside chosen_source and rejected_source")
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("rcpo weigh: needs scikit-learn; type pip install 'rcpo[weigh]'")
    both = settings.source or "source"
    return settings.chosen_source or both, settings.rejected_source or both


def _columns(row: dict[str, Any], probabilities: list[float]) -> dict[str, Any]:
    if RESPONSES in row:
        return {PROBABILITIES: probabilities}
    return dict(zip(COLUMNS.values(), probabilities, strict=True))


def _responses(
    rows: list[Any], shown: str, names: tuple[str, str], settings: argparse.Namespace
) -> tuple[list[str], list[int], list[int]]:
    """Texts and labels (1 target, 0 others, -1 unknown) of all responses, and how many a row has: chosen and
    rejected of each pair in turn, those of a list in its order."""
    texts, labels, nums, sources = list[str](), list[int](), list[int](), dict[str, None]()
    for number, row in enumerate(rows):
        at = f"{shown}: row {number}"
        is_list = isinstance(row, dict) and RESPONSES in row
        found = _of_list(row, at, names[0], settings) if is_list else _of_pair(row, at, names)
        column = next((name for name in (*COLUMNS.values(), PROBABILITIES) if name in row), None)
        if column is not None:
            raise UserError(f"{at} has {column} already; weigh the rows without it")
        nums.append(len(found))
        for name, response, source in found:
            texts.append(_text(response, name, at))
            labels.append(-1 if source is None else int(str(source) == settings.target))
            sources |= {} if source is None else {str(source): None}
    if settings.target not in sources:
        import difflib

        close = difflib.get_close_matches(settings.target, sources, n=3, cutoff=0) or ["none"]
        raise UserError(
            f"target={settings.target}: no response has this source; the closest are {', '.join(close)}"
        )
    return texts, labels, nums


def _of_pair(row: Any, at: str, names: tuple[str, str]) -> list[tuple[str, Any, Any]]:
    """Side, response and source of both."""
    for side, name in zip(COLUMNS, names, strict=True):
        if not isinstance(row, dict) or side not in row or name not in row:
            missing = side if not isinstance(row, dict) or side not in row else name
            raise UserError(
                f"{at} (counted from 0) has no {missing}; "
                f"{'give rows of pairs or lists' if missing == side else 'type source=COLUMN'}"
            )
    return [(side, row[side], row[name]) for side, name in zip(COLUMNS, names, strict=True)]


def _of_list(
    row: dict[str, Any], at: str, name: str, settings: argparse.Namespace
) -> list[tuple[str, Any, Any]]:
    """The same of a list's responses; their source is one for all, or a list of theirs."""
    if settings.chosen_source is not None:
        raise UserError(f"{at} is a list of responses; type source=COLUMN in place of chosen_source")
    if name not in row:
        raise UserError(f"{at} (counted from 0) has no {name}; type source=COLUMN")
    responses, sources = row[RESPONSES], row[name]
    if not isinstance(responses, list):
        raise UserError(f"{at}: {RESPONSES} is {type(responses).__name__}, not a list; mend it")
    if not isinstance(sources, list):
        sources = [sources] * len(responses)
    if len(sources) != len(responses):
        raise UserError(f"{at} has {len(sources)} of {name} for {len(responses)} responses; mend it")
    return [("a response", response, source) for response, source in zip(responses, sources, strict=True)]


def _text(response: Any, name: str, at: str) -> str:
    from rcpo.records.record import as_text

    if isinstance(response, str):
        return response
    try:
        return as_text(response)
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{at}: {name} is neither text nor messages; mend it") from None
