"""Runs to groups: what a group is, which runs belong into it, which are left out and why, what they differ
in. How groups are called is `rcpo.comparison.labels`'s.

A group is all runs whose configs agree in everything but the seed. Two runs of one group that were measured
on other pairs, or started from another model, than the rest are told by their first evaluation, and left out.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rcpo.common.errors import UserError
from rcpo.comparison.downstream import PREFIX, differences_by_question
from rcpo.comparison.keys import ABSENT, IGNORED, SPEED_ALONE, matches
from rcpo.comparison.labels import name_groups, of_most
from rcpo.comparison.load import ComparedRun, one_line
from rcpo.comparison.statistics import Difference, holm, paired_difference, seed_difference

OF_CALIBRATION = {
    "off": (),
    "on": ("scope", "estimator", "ema_beta", "max_log_alpha", "every", "warmup_steps"),
    "exact": ("scope", "estimator", "ema_beta", "max_log_alpha", "every", "warmup_steps"),
    "feedback": ("feedback.*", "max_log_alpha"),
    "balance": ("balance.*",),
    "published": ("scope", "ema_beta", "max_log_alpha"),
    "fixed": ("alpha",),
}
"""What each calibration reads of its section; the rest of it distinguishes nothing."""
OTHER_KIND = "other data or model than most groups"
PER_PAIR = ("chosen", "rejected", "margin", "accuracy", "fell")
OF_VISION = ("vision_gain", "vision_gain_blank")
"""Keys of eval.jsonl that are columns of runs with images, and one number a seed."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class LeftOut:
    """A run that is in no mean, and why."""

    run: ComparedRun
    reason: str


@dataclass
class Group:
    """Runs that differ in their seed alone."""

    objective: str
    """Its name, with the parameters in which groups of that objective differ."""
    calibration: str
    other: dict[str, str]
    """All further settings in which groups differ."""
    settings: Settings
    """All that distinguish a group."""
    runs: list[ComparedRun]
    """Done, whole and comparable; one a seed."""
    left_out: list[LeftOut] = field(default_factory=list)
    baseline: "Group | None" = None
    """The calibration=off group of the same objective and training, where there is one."""
    differences: dict[str, Difference] = field(default_factory=dict)
    """Against the baseline, by name of `PER_PAIR` and `OF_VISION`, and by downstream/TASK."""
    p_holm: float = float("nan")
    """p of the chosen difference, adjusted for all groups that have a baseline."""
    note: str = ""
    shown: dict[str, str] = field(default_factory=dict)
    """Those of `other` that matter to the numbers, but for data and model, and are not the usual ones."""
    kind: str = ""
    """What was measured: model and data in a few words, the same for groups that can be compared."""
    row_label: str = ""
    """Objective, `shown`, and `kind` where that is not the usual one."""

    @property
    def label(self) -> str:
        return f"{self.row_label} {self.calibration}"

    @property
    def name(self) -> str:
        """Its run's; of several the first one's and how many more there are."""
        runs = self.runs or [item.run for item in self.left_out]
        return runs[0].path.name + (f" +{len(runs) - 1}" if len(runs) > 1 else "")

    @property
    def seeds(self) -> str:
        return ",".join(str(run.seed) for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    groups: list[Group]
    differing: list[str]
    """Settings in which groups differ."""
    common: Settings
    """Settings in which they do not."""
    num_comparisons: int
    unreadable: list[LeftOut]
    """Runs that could not be put into a group."""
    usual: dict[str, str]
    """What a group has of the settings that `Group.shown` leaves out, having the value of most groups."""
    usual_of: dict[str, dict[str, str]]
    """The same of each objective's parameters, which `Group.objective` leaves out."""

    @property
    def left_out(self) -> list[LeftOut]:
        return [*self.unreadable, *(item for group in self.groups for item in group.left_out)]


def compare_runs(runs: Sequence[ComparedRun]) -> Comparison:
    """Groups in order of appearance of their objectives, `off` first, with differences against it. Raises
    UserError when no config can be read."""
    unreadable = [LeftOut(run, run.problem or "has no config") for run in runs if not run.settings]
    if len(unreadable) == len(runs):
        raise UserError(
            f"{runs[0].path}: {unreadable[0].reason}; there is nothing to compare; give other runs"
        )
    grouped: dict[str, list[ComparedRun]] = {}
    readable = [run for run in runs if run.settings]
    settings_of: dict[str, Settings] = {}
    for run, own in zip(readable, with_absent([distinguishing(run) for run in readable]), strict=True):
        key = repr(sorted(own.items(), key=str))
        grouped.setdefault(key, []).append(run)
        settings_of[key] = own
    settings = [settings_of[key] for key in grouped]
    differing = _differing(settings)
    usual_of = {
        str(name): usual_values([own for own in settings if own.get("objective.name") == name], "objective.")
        for name in dict.fromkeys(own.get("objective.name") for own in settings)
    }
    groups = [
        _make_group(members, own, settings, usual_of)
        for members, own in zip(grouped.values(), settings, strict=True)
    ]
    usual = name_groups(groups)
    kinds, objectives = (
        list(dict.fromkeys(getattr(group, name) for group in groups)) for name in ("kind", "objective")
    )
    groups.sort(
        key=lambda group: (
            kinds.index(group.kind),
            objectives.index(group.objective),
            group.row_label,
            _place(group.settings.get("calibration.name")),
            group.calibration,
        )
    )
    num_comparisons = _compare_with_off(groups)
    _mark_other_data(groups)
    common = {key: value for key, value in settings[0].items() if key not in differing}
    return Comparison(groups, differing, common, num_comparisons, unreadable, usual, usual_of)


def _place(calibration: object) -> int:
    """`off` first, then as the design lists them, others last."""
    known = list(OF_CALIBRATION)
    return known.index(str(calibration)) if calibration in known else len(known)


def distinguishing(run: ComparedRun) -> Settings:
    """The settings that make a run's group."""
    reads = OF_CALIBRATION.get(run.calibration)
    kept = {}
    for key, value in run.settings.items():
        section, _, rest = key.partition(".")
        if section == "calibration" and rest != "name" and reads is not None and not matches(rest, reads):
            continue
        if not matches(key, IGNORED):
            kept[key] = value
    return kept


def with_absent(settings: Sequence[Settings]) -> list[Settings]:
    """The settings of runs, with what an older run lacks and another one has, of an objective's the same
    objective: as ABSENT says that it trained."""

    def of(own: Settings, key: str) -> tuple[str, object]:
        return key, own.get("objective.name") if key.startswith("objective.") else None

    known = {of(own, key) for own in settings for key in own}
    return [
        own | {key: value for key, value in ABSENT.items() if key not in own and of(own, key) in known}
        for own in settings
    ]


def _differing(settings: Sequence[Settings], within: str = "") -> list[str]:
    """Keys below `within` that do not have one value in all of `settings`."""
    keys = dict.fromkeys(key for own in settings for key in own if key.startswith(within))
    return [key for key in keys if len({repr(own.get(key, "absent")) for own in settings}) > 1]


def usual_values(settings: Sequence[Settings], within: str) -> dict[str, str]:
    """Of the keys below `within` that differ, the value that more than half of `settings` have."""
    values = {
        key: of_most([one_line(own.get(key, "absent")) for own in settings])
        for key in _differing(settings, within)
    }
    return {key: value for key, value in values.items() if value is not None}


def _make_group(
    members: list[ComparedRun],
    own: Settings,
    everything: Sequence[Settings],
    usual_of: dict[str, dict[str, str]],
) -> Group:
    def labelled(section: str) -> str:
        """Name, and the parameters in which those of this name differ; an objective's that most have go
        without saying."""
        name = own.get(f"{section}.name", "?")
        namesakes = [other for other in everything if other.get(f"{section}.name") == name]
        usual = usual_of.get(str(name), {}) if section == "objective" else {}
        differing = [
            key
            for key in _differing(namesakes, f"{section}.")
            if key in own and one_line(own[key]) != usual.get(key)
        ]
        short = [
            key.removeprefix(f"{section}.").removeprefix("feedback.").removeprefix("balance.")
            for key in differing
        ]
        return " ".join(
            [
                one_line(name),
                *(f"{key}={one_line(own[full])}" for key, full in zip(short, differing, strict=True)),
            ]
        )

    other = {
        key: one_line(own.get(key, "absent"))
        for key in _differing(everything)
        if not key.startswith(("objective.", "calibration."))
    }
    group = Group(labelled("objective"), labelled("calibration"), other, own, [])
    for run in members:
        reason = run.problem or _other_start(run, group.runs) or _same_seed(run, group.runs)
        if reason is None:
            group.runs.append(run)
        else:
            group.left_out.append(LeftOut(run, reason))
    return group


def _other_start(run: ComparedRun, others: list[ComparedRun]) -> str | None:
    if others and not same_start(run, others[0]):
        return f"measured on other held-out pairs, or from another model, than {others[0].path}"
    return None


def _same_seed(run: ComparedRun, others: list[ComparedRun]) -> str | None:
    for other in others:
        if other.seed == run.seed:
            return f"repeats seed {run.seed} of {other.path}"
    return None


def same_start(one: ComparedRun, other: ComparedRun) -> bool:
    """Whether the first evaluations are of the same pairs and the same model: by the digest of the pairs
    where both runs have one, and by their log-probs; True where one has no per-pair results."""
    if one.held_out is not None and other.held_out is not None and one.held_out != other.held_out:
        return False
    if one.pairs is None or other.pairs is None:
        return True
    return is_same_z(one.pairs.start, other.pairs.start)


def is_same_z(one: np.ndarray, other: np.ndarray) -> bool:
    """Log-probs of equal shape, nan at the same places, where single answers have no such side, and equal up
    to rounding: 1 % and 0.02 nats on average."""
    if one.shape != other.shape or not np.array_equal(np.isnan(one), np.isnan(other)):
        return False
    one, other = one[~np.isnan(one)], other[~np.isnan(other)]
    return bool(np.abs(one - other).mean() <= 0.02 + 0.01 * np.abs(one).mean())


def _training(group: Group) -> Settings:
    """All that must agree between a group and its baseline."""
    return {
        key: value
        for key, value in group.settings.items()
        if not matches(key, SPEED_ALONE) and not key.startswith("calibration.")
    }


def _compare_with_off(groups: list[Group]) -> int:
    """Fill in baselines and differences; returns how many groups were compared."""
    for group in groups:
        training = _training(group)
        baselines = [
            other for other in groups if other.settings.get("calibration.name") == "off"
            and other is not group and _training(other) == training
        ]  # fmt: skip
        if group.settings.get("calibration.name") == "off" or not baselines:
            continue
        group.baseline = baselines[0]
        group.differences, group.note = _differences(group, baselines[0])
    compared = [group for group in groups if group.differences]
    adjusted = holm([group.differences["chosen"].p for group in compared])
    for group, p in zip(compared, adjusted, strict=True):
        group.p_holm = p
    return len(compared)


def _differences(group: Group, baseline: Group) -> tuple[dict[str, Difference], str]:
    """Over the seeds that both have, or nothing and why."""
    if not group.runs or not baseline.runs:
        return {}, ""
    if not same_start(group.runs[0], baseline.runs[0]):
        return {}, "other held-out pairs or model than off"
    off = {run.seed: run.pairs for run in baseline.runs}
    shared = [(run.pairs, off[run.seed]) for run in group.runs if run.seed in off]
    if not shared:
        return {}, "no seed in common with off"
    both = [(mine, its) for mine, its in shared if mine is not None and its is not None]
    if not both:
        return {}, "no per-pair results"
    values = {name: np.stack([a.values(name) - b.values(name) for a, b in both]) for name in PER_PAIR}
    values = {name: delta for name, delta in values.items() if delta.size}
    values |= _by_question(group, baseline)
    by_pair = {name: paired_difference(delta) for name, delta in values.items()}
    return by_pair | _by_seed(group, baseline), ""


def _by_seed(group: Group, baseline: Group) -> dict[str, Difference]:
    """Of what is one number a run, over the seeds that both have."""
    off = {run.seed: run for run in baseline.runs}
    found = {}
    for name in OF_VISION:
        both = [run.last(name) - off[run.seed].last(name) for run in group.runs if run.seed in off]
        delta = [each for each in both if not math.isnan(each)]
        if delta:
            found[name] = seed_difference(delta)
    return found


def _by_question(group: Group, baseline: Group) -> dict[str, np.ndarray]:
    """Of each task that both have answered, over the seeds that both have."""
    off = {run.seed: run.downstream for run in baseline.runs}
    found = {}
    for task in group.runs[0].downstream:
        both = [
            (run.downstream[task], off[run.seed][task])
            for run in group.runs
            if task in run.downstream
            and task in off.get(run.seed, {})
            and run.downstream[task].engine == off[run.seed][task].engine
        ]
        delta = differences_by_question(both) if both else None
        if delta is not None:
            found[f"{PREFIX}{task}"] = delta
    return found


def _mark_other_data(groups: list[Group]) -> None:
    """A note at groups whose data, held-out pairs or model are not those of most groups."""
    kinds = [group.kind for group in groups]
    usual = Counter(kinds).most_common(1)[0][0]
    first = next(
        (group for group, kind in zip(groups, kinds, strict=True) if kind == usual and group.runs), None
    )
    for group, kind in zip(groups, kinds, strict=True):
        if kind != usual:
            group.note = group.note or OTHER_KIND
        elif first is not None and group.runs and not same_start(group.runs[0], first.runs[0]):
            group.note = group.note or f"other held-out pairs or model than {first.label}"


def panels(comparison: Comparison) -> dict[str, list[Group]]:
    """Groups with runs, by objective and further settings: what is told and drawn together."""
    by_label: dict[str, list[Group]] = {}
    for group in comparison.groups:
        if group.runs:
            by_label.setdefault(group.row_label, []).append(group)
    return by_label
