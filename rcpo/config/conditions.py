"""What a config says of evaluations: which end a run, and which is the best.

Owns the grammar of train.stop_when and train.keep_best, and the keys that they may name. Text is matched,
never run. Loads nothing heavy; `rcpo.training.after_evaluation` asks.
"""

import difflib
import math
import operator
import re
from collections.abc import Mapping
from typing import NamedTuple

from rcpo.common.errors import UserError
from rcpo.config.schema import Config

PREFIX = "eval/"
"""Before the keys of eval.jsonl, as W&B has it: without, a key would be that of a training step."""
KEYS = (
    "displacement/chosen",
    "displacement/rejected",
    "displacement/margin",
    "displacement/accuracy",
    "displacement/chosen_down",
    "displacement/both_down",
    "logps/chosen",
    "logps/rejected",
)
"""Of every evaluation."""
LOSS = "loss"
"""Of every evaluation, but with objectives that weigh tokens."""
OF_BF16 = ("displacement/noise_floor",)
OF_PROBED = ("probed/chosen", "probed/rejected", "unprobed/chosen", "unprobed/rejected")
SMALLER_IS_BETTER = (LOSS, "displacement/chosen_down", "displacement/both_down", "displacement/noise_floor")
"""Where train.keep_best names no direction."""
SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
EXAMPLE = "eval/displacement/chosen < -5"
_COMPARISON = re.compile(r"\s*([A-Za-z][\w/]*)\s*(<=|>=|<|>)\s*([^\s<>=]+)\s*")


class Comparison(NamedTuple):
    """KEY < NUMBER, or another sign."""

    key: str
    """Of a row of eval.jsonl, without `PREFIX`."""
    sign: str
    limit: float

    def holds(self, row: Mapping[str, float]) -> bool:
        """Never where the number is nan."""
        return bool(SIGNS[self.sign](row.get(self.key, math.nan), self.limit))


class Condition(NamedTuple):
    """Comparisons joined by `and` and `or`; `and` binds them first."""

    alternatives: tuple[tuple[Comparison, ...], ...]

    def holds(self, row: Mapping[str, float]) -> bool:
        return any(all(each.holds(row) for each in together) for together in self.alternatives)

    def names(self) -> list[str]:
        """Without `PREFIX`, each once."""
        return list(dict.fromkeys(each.key for together in self.alternatives for each in together))


class Best(NamedTuple):
    """Which evaluation is the best one."""

    key: str
    """Without `PREFIX`."""
    is_largest: bool

    def beats(self, value: float, other: float) -> bool:
        return value > other if self.is_largest else value < other


def parse_condition(text: str) -> Condition:
    """Raises UserError for what is no condition; the keys may be any."""
    return Condition(
        tuple(
            tuple(_comparison(part, text) for part in re.split(r"\s+and\s+", together))
            for together in re.split(r"\s+or\s+", text)
        )
    )


def _comparison(part: str, text: str) -> Comparison:
    found = _COMPARISON.fullmatch(part)
    try:
        limit = math.nan if found is None else float(found[3])
    except ValueError:
        limit = math.nan
    if found is None or not math.isfinite(limit):
        raise UserError(
            f"train.stop_when={text}: {part.strip() or 'nothing'} is no comparison of a metric with a number "
            f"(KEY <, <=, > or >= NUMBER, several joined by `and` or `or`); type train.stop_when='{EXAMPLE}'"
        )
    return Comparison(_bare(found[1]), found[2], limit)


def parse_best(text: str) -> Best:
    """KEY, min:KEY or max:KEY; the key may be any."""
    direction, colon, key = text.partition(":")
    if not colon:
        key, direction = text, ""
    elif direction not in ("min", "max"):
        raise UserError(
            f"train.keep_best={text}: must be KEY, min:KEY or max:KEY; type train.keep_best=min:{key}"
        )
    bare = _bare(key)
    return Best(bare, direction == "max" or (not direction and bare not in SMALLER_IS_BETTER))


def _bare(key: str) -> str:
    """Without `PREFIX`; a key that lacks it cannot be one of an evaluation, and keeps a mark."""
    return key.removeprefix(PREFIX) if key.startswith(PREFIX) else f"!{key}"


def check_conditions(config: Config, reads_tokens: bool = False) -> None:
    """Raise UserError where train.stop_when or train.keep_best cannot be read, or names what this run's
    evaluations do not have; `reads_tokens`: whether the objective is known to."""
    train, known = config.train, keys_of(config, reads_tokens)
    if train.stop_when is not None:
        for key in parse_condition(train.stop_when).names():
            seen = f"train.stop_when={train.stop_when}"
            _check_key(config, known, key, seen, f"train.stop_when='{EXAMPLE}'")
    if train.keep_best is not None:
        key = parse_best(train.keep_best).key
        typed = "train.keep_best=eval/displacement/margin"
        _check_key(config, known, key, f"train.keep_best={train.keep_best}", typed)


def _check_key(config: Config, known: tuple[str, ...], key: str, seen: str, typed: str) -> None:
    if key in known:
        return
    name = key.removeprefix("!") if key.startswith("!") else PREFIX + key
    named = [PREFIX + each for each in known]
    if key == LOSS:
        name_of = config.objective["name"]
        why = f"is not measured with objective={name_of}, whose loss reads more than the responses' log-probs"
    elif key in OF_BF16:
        why = "is measured in bfloat16 alone"
    elif key in OF_PROBED:
        why = f"is measured where calibration steers by held-out pairs, not with {config.calibration.name}"
    elif name in known:
        why = f"is a training step's; did you mean {PREFIX}{name}?"
    elif close := _alike(name, named):
        why = f"is no metric of an evaluation; did you mean {' or '.join(close)}?"
    else:
        why = f"is no metric of an evaluation; there are {', '.join(named)}"
    raise UserError(f"{seen}: {name} {why}{'' if why.endswith('?') else ';'} type {typed}")


def _alike(name: str, named: list[str]) -> list[str]:
    """The keys that end alike, else those spelt alike."""
    last = name.rpartition("/")[2]
    same = [each for each in named if each.endswith(f"/{last}")]
    return same or difflib.get_close_matches(name, named, n=2, cutoff=0.6)


def keys_of(config: Config, reads_tokens: bool) -> tuple[str, ...]:
    """What an evaluation of this run has, without `PREFIX`; where the dtype is not decided yet, what it may
    have. `reads_tokens`: whether the objective does."""
    calibration = config.calibration
    return (
        *KEYS,
        *(() if reads_tokens else (LOSS,)),
        *(OF_BF16 if config.model.dtype != "float32" else ()),
        *(OF_PROBED if calibration.probe_pairs else ()),
    )
