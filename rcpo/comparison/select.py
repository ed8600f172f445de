"""Which of some runs are compared: those with given settings."""

import re
from collections.abc import Sequence

from rcpo.common.errors import UserError
from rcpo.comparison.load import ComparedRun


def select(runs: list[ComparedRun], conditions: Sequence[str]) -> list[ComparedRun]:
    """The runs that fulfil all of KEY=VALUE[,VALUE...]. Raises UserError where none does."""
    for condition in conditions:
        key, equals, values = condition.partition("=")
        key = {"objective": "objective.name", "calibration": "calibration.name"}.get(key, key)
        known = {name for run in runs for name in run.settings} | {"status"}
        if not equals or key not in known:
            near = [name for name in sorted(known) if name.endswith(f".{key}")]
            hint = f"--where {near[0]}=VALUE" if near else "--where objective=dpo"
            raise UserError(f"--where {condition}: is no KEY=VALUE with a key of these runs; type {hint}")
        seen = [str(run.status if key == "status" else run.settings.get(key, "absent")) for run in runs]
        kept = [
            run for run, value in zip(runs, seen, strict=True)
            if any(_equal(value, wanted) for wanted in values.split(","))
        ]  # fmt: skip
        if not kept:
            raise UserError(
                f"--where {condition}: no run has that; {key} is {', '.join(dict.fromkeys(seen))}; give one"
            )
        runs = kept
    return runs


def _equal(value: str, wanted: str) -> bool:
    """As text, or as numbers: 1e-6 is 1e-06."""
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
    if number.fullmatch(value) and number.fullmatch(wanted):
        return float(value) == float(wanted)
    return value.lower() == wanted.lower()
