"""A comparison in words: which objectives displace, what calibration does to it, at what cost, and whether
that is more than chance."""

import math
from collections.abc import Sequence

from rcpo.common.console import KEPT_NATS, nats, percent
from rcpo.comparison.groups import Comparison, Group, panels
from rcpo.comparison.table import COLUMNS, GroupLine, p_text


def headline(lines: Sequence[GroupLine], comparison: Comparison) -> str:
    """One or two sentences over all objectives."""
    chosen = {id(line.group): line.means["chosen"][0] for line in lines}
    by_label = [(label, _off(groups), groups) for label, groups in panels(comparison).items()]
    with_off = [(label, off, groups) for label, off, groups in by_label if off is not None]
    if not with_off:
        return (
            "There is no finished calibration=off run here, so nothing can be said of what calibration does."
        )
    falls = {label: chosen[id(off)] for label, off, _ in with_off if chosen[id(off)] <= -KEPT_NATS}
    if not falls:
        none = f"none of {len(with_off)} objectives pushes"
        which = none if len(with_off) > 1 else f"{with_off[0][0]} does not push"
        return f"Without calibration {which} the held-out chosen responses down."
    worst = min(falls, key=lambda label: falls[label])
    what = f"{worst} pushes the held-out chosen responses down"
    if len(with_off) > 1:
        verb = "push" if len(falls) > 1 else "pushes"
        what = f"{len(falls)} of {len(with_off)} objectives {verb} the held-out chosen responses down, "
        what += f"most of all {worst}" if len(falls) > 1 else worst
    text = f"Without calibration {what} ({nats(falls[worst])} nats)."
    mended = [
        label for label, off, groups in with_off if label in falls
        and any(chosen[id(group)] > -KEPT_NATS for group in groups if group is not off)
    ]  # fmt: skip
    tried = [label for label, _, groups in with_off if label in falls and len(groups) > 1]
    if not tried:
        return text
    if not mended:
        return f"{text} No calibration here prevents it."
    names = (
        "it does not" if len(falls) == 1 else f"{_listed(mended)} {'does' if len(mended) == 1 else 'do'} not"
    )
    return f"{text} With calibration {names}."


def sentences(lines: Sequence[GroupLine], comparison: Comparison) -> list[str]:
    """One for each objective that has both `off` and another calibration."""
    by_group = {id(line.group): line for line in lines}
    found = []
    for label, groups in panels(comparison).items():
        off = _off(groups)
        compared = [by_group[id(group)] for group in groups if group.differences]
        if off is None or not compared:
            continue
        best = max(compared, key=lambda line: line.means["chosen"][0])
        found.append(f"{label}: off {nats(by_group[id(off)].means['chosen'][0])} nats; {_against(best)}")
    return found


def _against(line: GroupLine) -> str:
    """The best calibration, its difference, whether that is more than noise, and its speed."""
    group = line.group
    found = group.differences["chosen"]
    text = f"{group.calibration} {nats(line.means['chosen'][0])}, a difference of {nats(found.mean)}"
    if math.isnan(group.p_holm):
        text += " of one pair"
    else:
        p = p_text(group.p_holm)
        p = f"p {p}" if p.startswith("<") else f"p = {p}"
        larger = "larger" if group.p_holm < 0.05 else "not larger"
        noise = "of the pairs (one seed)" if found.num_seeds == 1 else "of seeds and pairs"
        text += f" [{nats(found.low)}, {nats(found.high)}], {larger} than the noise {noise} ({p})"
    speed = _speed(line)
    return f"{text}{'' if math.isnan(speed) else f'; at {percent(speed)} of the speed of off'}."


def _speed(line: GroupLine) -> float:
    """Relative to the baseline's; medians over steps, means over seeds."""
    baseline = line.group.baseline
    assert baseline is not None
    column = next(column for column in COLUMNS if column.name == "pairs_per_second")
    values = [column.value(run, baseline) for run in baseline.runs]
    return line.means["pairs_per_second"][0] / (sum(values) / len(values))


def _off(groups: Sequence[Group]) -> Group | None:
    return next((group for group in groups if group.calibration == "off"), None)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
