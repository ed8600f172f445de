"""The table of a comparison: its columns, its lines and what stands below it. `rcpo.comparison.forms` writes
it.

Groups with no comparable run have a line of dashes: nothing disappears. Numbers are means over seeds with
their standard error."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rcpo.common.console import NOISE_MARK, above_noise, nats, number, percent
from rcpo.common.errors import UserError
from rcpo.comparison.downstream import PREFIX
from rcpo.comparison.groups import OF_VISION, OTHER_KIND, PER_PAIR, Comparison, Group, LeftOut
from rcpo.comparison.load import ComparedRun
from rcpo.comparison.statistics import mean_and_error
from rcpo.evaluation.engines import TRANSFORMERS


def _last(name: str) -> Callable[[ComparedRun, Group], float]:
    return lambda run, group: float(run.evals[f"displacement/{name}"][-1])


def _if_there(key: str) -> Callable[[ComparedRun, Group], float]:
    return lambda run, group: run.last(key)


def _speed(run: ComparedRun, group: Group) -> float:
    return _of(run.curves.get("speed/pairs_per_second"), np.nanmedian)


def _memory(run: ComparedRun, group: Group) -> float:
    return _of(run.curves.get("speed/peak_memory_gb"), np.nanmax)


def _of(values: np.ndarray | None, reduce: Callable[[np.ndarray], Any]) -> float:
    return math.nan if values is None or np.isnan(values).all() else float(reduce(values))


def in_band(run: ComparedRun, group: Group) -> float:
    """Share of the measured steps inside the band; only of steps that the baseline's runs measured too, where
    there are such: calibrations measure more often than `off` does."""
    measured = run.measured
    if not measured or not len(measured["step"]):
        return math.nan
    selected = np.ones(len(measured["step"]), bool)
    for other in (group.baseline or group).runs:
        if other.measured:
            selected &= np.isin(measured["step"], other.measured["step"])
    inside = measured["band/inside"]
    return float(inside[selected].mean() if selected.any() else inside.mean())


@dataclass(frozen=True)
class Column:
    """One number a run."""

    name: str
    """In --sort, CSV and JSON."""
    head: str
    value: Callable[[ComparedRun, Group], float]
    text: Callable[[float], str]
    rank: int
    """The highest is left out first where a terminal is narrow."""
    only_with: str | None = None
    """A key of eval.jsonl: without it in any run there is no such column."""


def signed(value: float) -> str:
    return f"{value:+.3f}"


COLUMNS = (
    Column("chosen", "chosen", _last("chosen"), nats, 0),
    Column("rejected", "rejected", _last("rejected"), nats, 3),
    Column("margin", "margin", _last("margin"), nats, 7),
    Column("accuracy", "accuracy", _last("accuracy"), "{:.2f}".format, 2),
    Column("fell", "fell", _last("chosen_down"), percent, 4),
    Column("in_band", "in band", in_band, percent, 5),
    Column("worst", "worst", lambda run, group: float(np.nanmin(run.evals["displacement/chosen"])), nats, 9),
    Column("pairs_per_second", "pairs/s", _speed, number, 6),
    Column("memory_gb", "GB", _memory, number, 8),
    Column("loss", "loss", _if_there("loss"), number, 10, only_with="loss"),
    *(Column(name, name.replace("_", " "), _if_there(name), signed, 1, only_with=name) for name in OF_VISION),
)


def columns_of(comparison: Comparison) -> list[Column]:
    """`COLUMNS`, without those that no run has, and one for every task that a run has been evaluated on."""
    tasks = dict.fromkeys(
        task for group in comparison.groups for run in group.runs for task in run.downstream
    )

    def score(task: str) -> Callable[[ComparedRun, Group], float]:
        return lambda run, group: run.downstream[task].value if task in run.downstream else math.nan

    more = [Column(f"{PREFIX}{task}", task, score(task), "{:.3f}".format, 1) for task in tasks]
    return [*(column for column in COLUMNS if _is_known(column.only_with, comparison)), *more]


def _is_known(key: str | None, comparison: Comparison) -> bool:
    """Whether a run has this key of eval.jsonl."""
    return key is None or any(key in run.evals for group in comparison.groups for run in group.runs)


def has_own_difference(name: str) -> bool:
    """Whether a column has one of its own beside it: its difference to off."""
    return name in OF_VISION or name.startswith(PREFIX)


SMALLEST_NATS = 0.005
"""A mean difference smaller than this is none, whatever its p: it would be written as 0.00."""
MAX_PATHS = 5
"""Paths named on one line of runs that are left out; --json names all."""
NOTES = (
    "chosen, rejected, margin: held-out change of log-probability in nats, at the end; worst: lowest chosen "
    "of all evaluations; fell: share of chosen responses that became less likely; in band: of the "
    "steps that measured it and that off measured too, by each group's own estimator.",
    "{pm}: standard error over the n seeds.",
    "vs off: mean difference of chosen to calibration=off, paired by seed and by held-out pair, with its "
    "95 % interval; p from a t test that takes both pairs and seeds as random (Cochran and Cox), Holm-"
    "adjusted for {num} groups. Bracketed p: one seed only, so the noise between seeds is not in it.",
)
VISION_NOTE = (
    "vision gain: share of held-out pairs with z_w > z_l, less the same with one another's images, at the "
    "end (0: the model does not look), and vision gain blank with grey images in their place; vs off: paired "
    "by seed alone, with a 95 % interval from two seeds on."
)


@dataclass(frozen=True)
class GroupLine:
    """A line of the table: one group, means over its seeds."""

    group: Group
    means: dict[str, tuple[float, float]]
    """(mean, standard error) by name of `COLUMNS`; nan where nothing was measured."""
    noise_floor: float | None = None
    """What rounding alone may make of the mean of chosen or rejected; None in float32."""

    def flat(self) -> dict[str, Any]:
        """Flat, for CSV and JSON; None where nothing was measured."""
        group = self.group
        row: dict[str, Any] = {
            "objective": group.objective, "calibration": group.calibration, **group.other,
            "n": len(group.runs), "seeds": group.seeds, "left_out": len(group.left_out), "run": group.name,
        }  # fmt: skip
        for name, (mean, error) in self.means.items():
            row |= {name: mean, f"{name}_se": error}
        for name in (*PER_PAIR, *filter(has_own_difference, self.means)):
            found = group.differences.get(name)
            row |= {
                f"vs_off_{name}{suffix}": None if found is None else getattr(found, key)
                for suffix, key in (("", "mean"), ("_low", "low"), ("_high", "high"), ("_p", "p"))
            }
        found = group.differences.get("chosen")
        row |= {
            "vs_off_chosen_p_holm": group.p_holm,
            "vs_off_chosen_se_pairs": found and found.se_pairs,
            "vs_off_chosen_se_seeds": found and found.se_seeds,
            "vs_off_seeds": found and found.num_seeds,
            "vs_off_pairs": found and found.num_pairs,
            "noise_floor": self.noise_floor,
            "note": group.note,
        }
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }


def make_lines(comparison: Comparison, sort: str | None = None) -> list[GroupLine]:
    """One line a group; sorted by a column, falling where `sort` begins with "-", groups without a value
    last."""
    lines, columns = [], columns_of(comparison)
    for group in comparison.groups:
        means = {}
        for column in columns:
            values = [value for run in group.runs if not math.isnan(value := column.value(run, group))]
            means[column.name] = mean_and_error(values) if values else (math.nan, math.nan)
        lines.append(GroupLine(group, means, _noise_floor(group)))
    if sort is None:
        return lines
    name, falling = sort.removeprefix("-"), sort.startswith("-")
    names = ["objective", "calibration", *(column.name for column in columns), "vs_off"]
    if name not in names:
        raise UserError(f"--sort {sort}: no such column; choose one of {', '.join(names)}, or -NAME to fall")
    if name in ("objective", "calibration"):
        return sorted(lines, key=lambda line: getattr(line.group, name), reverse=falling)

    def key(line: GroupLine) -> tuple[bool, float]:
        found = line.group.differences.get("chosen")
        value = (found.mean if found else math.nan) if name == "vs_off" else line.means[name][0]
        return math.isnan(value), -value if falling else value

    return sorted(lines, key=key)


OF_FLOOR = {"chosen": 1.0, "rejected": 1.0, "margin": math.sqrt(2), "worst": 1.0}
"""Noise of a column's mean, in those of one side's."""


def _noise_floor(group: Group) -> float | None:
    """Of a mean over seeds, whose rounding is independent."""
    floors = [
        found[-1] for run in group.runs if (found := run.evals.get("displacement/noise_floor")) is not None
    ]
    return float(np.mean(floors)) / math.sqrt(len(group.runs)) if floors else None


def number_text(line: GroupLine, column: Column, pm: str) -> str:
    """Mean and standard error; `NOISE_MARK` behind what rounding alone may be."""
    mean, error = line.means[column.name]
    text = "-" if math.isnan(mean) else column.text(mean)
    if line.noise_floor is not None and column.name in OF_FLOOR and not math.isnan(mean):
        text = above_noise(mean, OF_FLOOR[column.name] * line.noise_floor)
    if math.isnan(error):
        return text
    if has_own_difference(column.name):
        return f"{text} {pm} {error:.3f}"
    return f"{text} {pm} {error:.2f}" if column.name in OF_FLOOR else text


def is_difference(line: GroupLine) -> bool:
    """Whether the difference to off is one at all: two decimals show it, and rounding does not make it."""
    found = line.group.differences["chosen"]
    floor = math.sqrt(2) * (line.noise_floor or 0.0)
    return abs(found.mean) >= max(SMALLEST_NATS, floor)


def difference_text(line: GroupLine) -> str:
    """The difference to off with its interval."""
    group, found = line.group, line.group.differences.get("chosen")
    if found is None:
        return "" if group.baseline is None or not group.note else group.note
    return f"{nats(found.mean)} [{nats(found.low)}, {nats(found.high)}]"


def own_difference_text(line: GroupLine, name: str) -> str:
    """The difference of a task's score, or of a vision gain, to off with its interval, where there is one; in
    brackets where one seed gave it."""
    found = line.group.differences.get(name)
    if found is None:
        return ""
    text = f"{found.mean:+.3f}"
    if not math.isnan(found.low):
        text += f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"({text})" if found.num_seeds == 1 else text


def difference_p_text(line: GroupLine) -> str:
    """p of the difference; a dash where there is none."""
    found = line.group.differences.get("chosen")
    if found is None:
        return ""
    if not is_difference(line):
        return "-"
    p = p_text(line.group.p_holm)
    return f"({p})" if found.num_seeds == 1 else p


def p_text(p: float) -> str:
    if math.isnan(p):
        return "-"
    return "<.001" if p < 0.001 else f"{p:.3f}".replace("0.", ".", 1) if p < 0.9995 else "1"


def left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """One line for each reason; a sweep that has just begun leaves out many runs for the same one."""
    paths: dict[str, list[str]] = {}
    for item in left_out:
        paths.setdefault(item.reason, []).append(str(item.run.path))
    lines = []
    for reason, found in paths.items():
        more = f" and {len(found) - MAX_PATHS} more" if len(found) > MAX_PATHS else ""
        lines.append(f"left out: {', '.join(found[:MAX_PATHS])}{more}: {reason}")
    return lines


def _downstream_notes(comparison: Comparison) -> list[str]:
    """What each task's number is, which other engine than transformers asked it, and what the models that the
    runs started from have."""
    found: dict[str, list[float]] = {}
    for run in (run for group in comparison.groups for run in group.runs):
        for task, item in run.downstream.items():
            by = "" if item.engine == TRANSFORMERS else f", by {item.engine}"
            known = found.setdefault(f"{PREFIX}{task}: {item.metric} at the end{by}", [])
            if item.initial is not None and item.initial not in known:
                known.append(item.initial)
    return [
        said + (f"; before training {', '.join(f'{value:.3f}' for value in known)}." if known else ".")
        for said, known in found.items()
    ]


def notes(comparison: Comparison, pm: str) -> list[str]:
    """What the numbers are, then every run that is left out, then every group that is of another kind."""
    lines = [note.format(pm=pm, num=comparison.num_comparisons) for note in NOTES[:2]]
    if _is_known("loss", comparison):
        lines.append("loss: of the held-out pairs, at the end; to be compared within one objective alone.")
    if any(_is_known(name, comparison) for name in OF_VISION):
        lines.append(VISION_NOTE)
    if comparison.num_comparisons:
        lines.append(NOTES[2].format(num=comparison.num_comparisons))
    lines += _downstream_notes(comparison)
    floors = [floor for group in comparison.groups if (floor := _noise_floor(group)) is not None]
    if floors:
        lines.append(
            f"{NOISE_MARK}: no more than rounding may have made of the mean; the noise floor of bfloat16 is "
            f"up to {max(floors):.2g} nats here."
        )
    of_objectives = {
        f"{name}'s {key.removeprefix('objective.')}": value
        for name, values in comparison.usual_of.items()
        for key, value in values.items()
    }
    if usual := comparison.usual | of_objectives:
        said = ", ".join(f"{key}={value}" for key, value in usual.items())
        lines.append(f"where nothing else is said: {said}.")
    lines += left_out_lines(comparison.left_out)
    told = [group for group in comparison.groups if group.note and group.note != OTHER_KIND]
    return lines + [f"{group.label}: {group.note}" for group in told]
