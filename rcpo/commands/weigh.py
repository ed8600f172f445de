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
SETTINGS = (
    Setting("out", "a .jsonl file for the rows with the new columns; beside it .png, the reliability", Path),
    Setting("source", "the column that says where a row's responses come from (default: source)"),
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
probability_chosen and probability_rejected, for objective.sample_weight=dora_mean (DoRA, arXiv
2504.05831). Probabilities are out of fold, calibrated, and as if all sources were equally common.
Rows whose source is null get the mean of all folds. Needs pip install 'rcpo[weigh]'."""
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
    texts, labels = _responses(rows, places[0], names, settings.target)
    import numpy as np

    from rcpo.quality.reliability import plot_reliability
    from rcpo.quality.source import at_equal_shares, features_of, out_of_fold, reliability

    is_target, of_row = np.array(labels), np.repeat(np.arange(len(rows)), 2)
    features = features_of(texts, settings.encoder)
    p = out_of_fold(features, is_target, of_row, settings.folds, settings.calibration, settings.seed)
    num_target, num_others = int((is_target == 1).sum()), int((is_target == 0).sum())
    gamma = num_others / num_target if settings.gamma is None else settings.gamma
    found = reliability(p[is_target >= 0], is_target[is_target >= 0])
    weighed = at_equal_shares(p, gamma).reshape(-1, 2)
    lines = [
        json.dumps(row | dict(zip(COLUMNS.values(), map(float, both), strict=True)), ensure_ascii=False)
        + "\n"
        for row, both in zip(rows, weighed, strict=True)
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


def _responses(
    rows: list[Any], shown: str, names: tuple[str, str], target: str
) -> tuple[list[str], list[int]]:
    """Texts and labels (1 target, 0 others, -1 unknown), chosen and rejected of each row in turn."""
    from rcpo.records.record import as_text

    texts, labels, sources = list[str](), list[int](), dict[str, None]()
    for number, row in enumerate(rows):
        for side, name in zip(COLUMNS, names, strict=True):
            if not isinstance(row, dict) or side not in row or name not in row:
                missing = side if not isinstance(row, dict) or side not in row else name
                raise UserError(
                    f"{shown}: row {number} (counted from 0) has no {missing}; "
                    f"{'give rows of pairs' if missing == side else 'type source=COLUMN'}"
                )
            if column := next((column for column in COLUMNS.values() if column in row), None):
                raise UserError(f"{shown}: row {number} has {column} already; weigh the rows without it")
            text = row[side]
            if not isinstance(text, str):
                try:
                    text = as_text(text)
                except (TypeError, KeyError, AttributeError):
                    raise UserError(
                        f"{shown}: row {number}: {side} is neither text nor messages; mend it"
                    ) from None
            texts.append(text)
            source = row[name]
            labels.append(-1 if source is None else int(str(source) == target))
            sources |= {} if source is None else {str(source): None}
    if target not in sources:
        import difflib

        close = difflib.get_close_matches(target, sources, n=3, cutoff=0) or ["none"]
        raise UserError(f"target={target}: no response has this source; the closest are {', '.join(close)}")
    return texts, labels
