"""The held-out pairs whose chosen response fell most, with their words and their CHES under the initial
model: a table of the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from rcpo.comparison.groups import Group
from rcpo.comparison.held_out import data_settings, held_out_records, model_settings
from rcpo.comparison.load import ComparedRun
from rcpo.comparison.statistics import spearman
from rcpo.records.record import shortened_texts
from rcpo.report.pair_ches import Ches, ches_of_pairs

if TYPE_CHECKING:
    from rcpo.records.record import PreferenceRecord

NUM_PAIRS = 10

ChesChoice = Literal["auto", "yes", "no"]
"""auto: where the model is here and it takes no more than about a minute."""


@dataclass
class FallenPair:
    """`index` in the held-out set; change of chosen by calibration, mean over seeds."""

    index: int
    changes: dict[str, float]
    texts: list[str] | None = None
    """Prompt, chosen and rejected."""
    ches: Ches | None = None
    percentile: float | None = None
    """Percent of the held-out pairs with a lower length-normalised CHES; None where not all were scored."""


@dataclass
class Fallen:
    """The pairs whose chosen response fell most under the first of some groups that has per-pair results."""

    run: ComparedRun
    """One of that group."""
    calibration: str
    """Of that group."""
    pairs: list[FallenPair]
    changes: np.ndarray
    """Of the chosen log-probs of all held-out pairs in that group, (n,)."""
    no_text: str | None = None
    """Why the pairs have no words."""
    no_ches: str | None = None
    """Why they have no CHES."""
    correlation: float | None = None
    """Spearman's, of length-normalised CHES with `changes`; None where not all pairs were scored."""


def find_fallen(by_label: dict[str, list[Group]], choice: ChesChoice) -> dict[str, Fallen]:
    """For the groups of each label; data is read, and pairs are scored, once for all labels that share
    them."""
    found = {
        label: fallen for label, groups in by_label.items() if (fallen := most_fallen(groups)) is not None
    }
    shared: dict[str, list[Fallen]] = {}
    for fallen in found.values():
        shared.setdefault(repr(data_settings(fallen.run)), []).append(fallen)
    for members in shared.values():
        records = held_out_records(members[0].run)
        if isinstance(records, str):
            for fallen in members:
                fallen.no_text = fallen.no_ches = records
            continue
        for pair in (pair for fallen in members for pair in fallen.pairs):
            pair.texts = shortened_texts(records[pair.index])
        _add_ches(members, records, choice)
    return found


def most_fallen(groups: Sequence[Group]) -> Fallen | None:
    """The ten pairs whose chosen response fell most, and what became of them in the other groups that were
    measured on the same pairs; None where no chosen response fell."""
    measured = [(group, run) for group in groups for run in group.runs[:1] if run.pairs is not None]
    if not measured:
        return None
    means = {group.calibration: _mean_change(group) for group, _ in measured}
    group, run = measured[0]
    first = means[group.calibration]
    means = {name: values for name, values in means.items() if len(values) == len(first)}
    pairs = [
        FallenPair(int(idx), {name: float(values[idx]) for name, values in means.items()})
        for idx in np.argsort(first)[:NUM_PAIRS]
        if first[idx] < 0
    ]
    return Fallen(run, group.calibration, pairs, first) if pairs else None


def _mean_change(group: Group) -> np.ndarray:
    """Of the chosen log-probs, over seeds, (n,)."""
    mean: np.ndarray = np.mean([run.pairs.r_w for run in group.runs if run.pairs is not None], 0)
    return mean


def _add_ches(members: Sequence[Fallen], records: "Sequence[PreferenceRecord]", choice: ChesChoice) -> None:
    """Fill in `ches`, or `no_ches`, where it is wanted. Members that share their data may differ in the
    model."""
    if choice == "no":
        return
    by_model: dict[str, list[Fallen]] = {}
    for fallen in members:
        by_model.setdefault(repr(model_settings(fallen.run)), []).append(fallen)
    for sharing in by_model.values():
        wanted = [pair.index for fallen in sharing for pair in fallen.pairs]
        found = ches_of_pairs(sharing[0].run, records, wanted, is_asked=choice == "yes")
        for fallen in sharing:
            if isinstance(found, str):
                fallen.no_ches = found
            else:
                _fill_in(fallen, found)


def _fill_in(fallen: Fallen, found: dict[int, Ches]) -> None:
    for pair in fallen.pairs:
        pair.ches = found[pair.index]
    if len(found) < len(fallen.changes):
        return
    all_of_them = np.array([found[idx].per_token for idx in range(len(found))])
    fallen.correlation = spearman(all_of_them, fallen.changes)
    for pair in fallen.pairs:
        pair.percentile = 100 * float((all_of_them < all_of_them[pair.index]).mean())
