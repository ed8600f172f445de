"""Which run's answers are judged against which: of the same group as `rcpo compare` has it, with
calibration=off and the same seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rcpo.comparison.groups import compare_runs
from rcpo.comparison.load import load_run


@dataclass(frozen=True)
class Pairing:
    """Of runs."""

    against: dict[Path, Path]
    """A run, and the `off` run of its objective, training and seed."""
    left_out: dict[Path, str]
    """Why a run has none."""


def against_off(paths: Sequence[Path]) -> Pairing:
    """`off` runs themselves are in neither. Raises UserError where no run can be read."""
    comparison = compare_runs([load_run(path) for path in paths])
    left_out = {item.run.path: item.reason for item in comparison.left_out}
    against: dict[Path, Path] = {}
    for group in comparison.groups:
        off = {} if group.baseline is None else {run.seed: run.path for run in group.baseline.runs}
        for run in group.runs:
            if run.calibration == "off":
                continue
            if run.seed in off:
                against[run.path] = off[run.seed]
            else:
                left_out[run.path] = "has no calibration=off run of its objective, training and seed"
    return Pairing(against, left_out)
