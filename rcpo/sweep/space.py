"""What a search looks through and for, in a sweep file: ranges on axes, and the key `search`.

Read and checked here; `rcpo.sweep.search` searches.

    axes:
      objective: [dpo, simpo]                                  # one of these: categorical
      optim.lr: {type: float, low: 1e-6, high: 1e-4, log: true}
      train.pairs_per_step: {type: int, low: 4, high: 16, step: 4}
    search: {metric: eval/displacement/margin, direction: maximize, trials: 20, seed: 0}

The words are optuna's own: low and high are both possible; log draws evenly in the logarithm; step counts
from low.
"""

from dataclasses import dataclass
from typing import Any

from rcpo.common.errors import UserError

RANGE_KEYS = ("type", "low", "high", "step", "log")
SEARCH_KEYS = ("metric", "direction", "trials", "seed")
DIRECTIONS = ("maximize", "minimize")
EVAL = "eval/"


@dataclass(frozen=True)
class Range:
    """Numbers between two, for one axis."""

    type: str
    """float or int."""
    low: float
    high: float
    step: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Search:
    """What is best, and how many trials look for it."""

    metric: str
    """A key of eval.jsonl behind eval/; its last row counts."""
    direction: str
    trials: int
    seed: int = 0


def is_range(value: Any) -> bool:
    """Whether this value of `axes` is a range, or means to be one."""
    return isinstance(value, dict)


def range_of(key: str, tree: dict[str, Any]) -> Range:
    """The range on the axis `key`. Raises UserError."""
    where = f"axes.{key}"
    for name in tree:
        if name not in RANGE_KEYS:
            raise UserError(f"{where}.{name}: no such key; a range is {{type: float, low: LOW, high: HIGH}}")
    kind = tree.get("type")
    if kind not in ("float", "int"):
        raise UserError(f"{where}.type: {kind}: must be float or int; for choices write a list")
    numbers = {
        name: _number(f"{where}.{name}", tree[name], kind) for name in ("low", "high", "step") if name in tree
    }
    for name in ("low", "high"):
        if name not in numbers:
            raise UserError(f"{where}.{name}: has no value and needs one")
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    log = _truth(f"{where}.log", tree.get("log", "false"))
    if not low < high:
        raise UserError(f"{where}.low: {low:g}: must be less than high: {high:g}")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"{where}.step: {step:g}: must be above 0 and at most high - low")
    if log and (step is not None or low <= 0):
        raise UserError(f"{where}.log: must have low above 0 and no step; change them, or leave log out")
    return Range(kind, low, high, step, log)


def search_of(tree: Any) -> Search:
    """The key `search`. Raises UserError."""
    if not isinstance(tree, dict):
        raise UserError("search: must hold keys and values; write {metric: eval/KEY, direction: maximize}")
    for name in tree:
        if name not in SEARCH_KEYS:
            raise UserError(f"search.{name}: no such key; the keys are {', '.join(SEARCH_KEYS)}")
    metric, direction = str(tree.get("metric", "")), tree.get("direction")
    if not metric.startswith(EVAL) or metric == EVAL:
        raise UserError(
            f"search.metric: {metric or 'has no value'}: must be eval/ and a key of eval.jsonl; "
            "type for example eval/displacement/margin"
        )
    if direction not in DIRECTIONS:
        raise UserError(f"search.direction: {direction}: must be maximize or minimize")
    trials = _number("search.trials", tree.get("trials", "20"), "int")
    seed = _number("search.seed", tree.get("seed", "0"), "int")
    if trials < 1 or seed < 0:
        raise UserError("search: trials must be at least 1 and seed at least 0")
    return Search(metric, direction, int(trials), int(seed))


def _number(key: str, text: Any, kind: str) -> float:
    """`text` as a finite number of this kind, or UserError that names `key`."""
    try:
        number = int(text) if kind == "int" else float(text)
    except (TypeError, ValueError):
        raise UserError(f"{key}: {text}: must be {'a whole' if kind == 'int' else 'a'} number") from None
    if abs(number) > 1e300 or number != number:
        raise UserError(f"{key}: {text}: must be a finite number")
    return number


def _truth(key: str, text: Any) -> bool:
    if text not in ("true", "false"):
        raise UserError(f"{key}: {text}: must be true or false")
    return bool(text == "true")
