"""A comparison in words: which objectives displace, what calibration does to it, at what cost, and whether
that is more than chance."""

import math
from collections.abc import Mapping, Sequence

from rcpo.common.console import KEPT_NATS, nats, percent
from rcpo.comparison.groups import Comparison, Group, panels
from rcpo.comparison.table import COLUMNS, GroupLine, is_difference, p_text

MAX_NAMES = 5
"""Named in one sentence."""


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
        tried_names = {str(off.settings.get("objective.name")) for _, off, _ in with_off}
        some = f"none of {len(tried_names)} objectives pushes"
        which = some if len(tried_names) > 1 else f"{min(tried_names)} does not push"
        return f"Without calibration {which} the held-out chosen responses down."
    worst = min(falls, key=lambda label: falls[label])
    what = _pushes(falls, {label: str(off.settings.get("objective.name")) for label, off, _ in with_off})
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


def _pushes(falls: Mapping[str, float], objectives: Mapping[str, str]) -> str:
    """Which objectives push the chosen responses down, of those that ran without calibration; `objectives`
    are their names by label, `falls` the changes of those that fell."""
    worst = min(falls, key=lambda label: falls[label])
    names, falling = set(objectives.values()), {objectives[label] for label in falls}
    down = "the held-out chosen responses down"
    if len(objectives) == 1:
        return f"{worst} pushes {down}"
    most = f"most of all {worst}" if len(falls) > 1 else worst
    if len(names) == 1:
        return f"{min(names)} pushes {down} in {len(falls)} of {len(objectives)} settings, {most}"
    verb = "push" if len(falling) > 1 else "pushes"
    return f"{len(falling)} of {len(names)} objectives {verb} {down}, {most}"


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
    text = f"{group.calibration} {nats(line.means['chosen'][0])}, "
    text += f"a difference of {nats(found.mean)}" if is_difference(line) else "no difference"
    if not is_difference(line):
        pass
    elif math.isnan(group.p_holm):
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
    if len(names) > MAX_NAMES:
        names = [*names[: MAX_NAMES - 1], f"{len(names) - MAX_NAMES + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
