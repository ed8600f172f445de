"""Which rows are held out and which train: drawn by data.seed from those that can be used.

Owns the draws and what is left of a source after them. Whether a row can be used is asked of its caller,
since that takes the tokenizer: only rows that are drawn are looked at, so a small data.train_pairs of a large
file stays cheap. Called by `rcpo.records.load`.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rcpo.common.errors import UserError
from rcpo.config.schema import DataConfig
from rcpo.records.account import Account, RowAccount, why
from rcpo.records.record import PreferenceRecord

Judge: TypeAlias = Callable[[Sequence[PreferenceRecord]], Sequence[str | None]]
"""For each record None, or the reason why it cannot be used. Asked once for a record."""
NOTE = "note: "
"""Begins a line of the report that a user reads on the console too."""
MOST_HELD_OUT = 5
"""One in so many of the training file's pairs is held out where data.eval_pairs leaves fewer to train on."""
FEWER = "give more rows, or type a smaller data.eval_pairs=N"


def all_usable(records: Sequence[PreferenceRecord]) -> list[None]:
    return [None] * len(records)


@dataclass(frozen=True)
class SourceRecords:
    """The rows of one place that are preference records."""

    name: str
    """The key and the value that say where they are, for errors."""
    records: list[PreferenceRecord]
    account: RowAccount
    size: int
    """Rows that there are, slices aside."""

    def error(self, fault: str) -> UserError:
        return UserError(f"{self.name}: {fault}")


@dataclass
class Selection:
    """Training and held-out records in their source's order; no pair is in both."""

    train: list[PreferenceRecord]
    held_out: list[PreferenceRecord]
    account: Account
    report: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Drawn:
    drawn: list[PreferenceRecord]
    rest: list[PreferenceRecord]
    """Not looked at."""
    dropped: dict[str, list[int]]


def select(
    config: DataConfig, training: SourceRecords, own: SourceRecords | None, train: Judge, held_out: Judge
) -> Selection:
    """Hold data.eval_pairs usable pairs out, of `own` where the held-out pairs have a place of their own, and
    train on the others, data.train_pairs at most. Raises UserError where one of the two is empty."""
    report: list[str] = []
    if own is None:
        held = _hold_out(config, training, held_out, report)
        account, own_account = training.account.with_dropped(held.dropped), None
    else:
        held = _draw_usable(own.records, config.eval_pairs, config.seed, held_out)
        own_account = own.account.with_dropped(held.dropped)
        if not held.drawn:
            raise own.error(
                f"no held-out pair is left of {own_account.read} rows{why(own_account.dropped)}; "
                f"{advice(own_account.dropped)}"
            )
        own_account = dataclasses.replace(own_account, undrawn=len(held.rest), held_out=len(held.drawn))
        if held.rest:
            report.append(f"{len(held.drawn)} held-out pairs drawn by data.seed={config.seed}")
        account = training.account
    rest = held.rest if own is None else training.records
    kept = _without(rest, held.drawn, report)
    num_identical = len(rest) - len(kept)
    taken = _take(kept, config, train, report)
    account = account.with_dropped(taken.dropped)
    if not taken.drawn:
        raise training.error(
            f"no training pair is left of {account.read} rows beside {len(held.drawn)} held-out pairs"
            f"{why(account.dropped)}; {FEWER if num_identical else advice(account.dropped)}"
        )
    account = dataclasses.replace(
        account,
        identical=num_identical,
        undrawn=account.undrawn + len(taken.rest),
        held_out=len(held.drawn) if own is None else 0,
        trained=len(taken.drawn),
    )
    rows = [record.row for record in held.drawn]
    return Selection(taken.drawn, held.drawn, Account(account, own_account, rows), report)


def advice(dropped: dict[str, list[int]]) -> str:
    """What helps where these rows are lost."""
    reason = max(dropped, key=lambda each: len(dropped[each]), default="").lower()
    if "system" in reason:
        return "type data.system=merge to put the system turn into the user's, or model.chat_template=plain"
    if "template" in reason:
        return "type another model.chat_template, or give rows that it takes"
    return "give more rows, or rows of another form"


def _hold_out(config: DataConfig, training: SourceRecords, judge: Judge, report: list[str]) -> _Drawn:
    """data.eval_pairs of the training pairs; where that leaves less than one in `MOST_HELD_OUT` to train on,
    one in so many is held out instead, and a note says so."""
    records = training.records
    num = _at_most(config.eval_pairs, len(records))
    held = _draw_usable(records, num, config.seed, judge)
    lost = sum(map(len, held.dropped.values()))
    usable = len(records) - lost
    if usable < 2:
        reasons = why(training.account.with_dropped(held.dropped).dropped)
        raise training.error(
            f"has {usable} usable pair{'' if usable == 1 else 's'}{reasons}; give at least 2, one to "
            f"hold out{'; or ' + advice(held.dropped) if lost else ''}"
        )
    if _at_most(len(held.drawn), usable) < len(held.drawn):  # since many rows could not be used
        held = _fewer_held_out(records, held, _at_most(len(held.drawn), usable), config.seed)
    if (kept := len(held.drawn)) < config.eval_pairs:
        report.append(
            f"{NOTE}data.eval_pairs={config.eval_pairs}: there are {usable} usable pairs, so {kept} of them "
            f"are held out; type data.eval_pairs={kept} to say that this is meant"
        )
    report.append(
        f"{len(held.drawn)} held-out pairs drawn from the {usable} pairs by data.seed={config.seed}"
    )
    return held


def _at_most(num: int, num_pairs: int) -> int:
    """How many of the pairs to hold out in place of `num`: no more than leaves one in `MOST_HELD_OUT`."""
    share = max(1, num_pairs // MOST_HELD_OUT)
    return num if num_pairs - num >= share else share


def _fewer_held_out(records: list[PreferenceRecord], held: _Drawn, num: int, seed: int) -> _Drawn:
    """`num` of the drawn ones, drawn by `seed`; the others are training pairs."""
    kept = sorted(random.Random(seed).sample(range(len(held.drawn)), num))
    drawn = [held.drawn[place] for place in kept]
    left = {id(record) for record in (*held.drawn, *held.rest)} - {id(record) for record in drawn}
    return _Drawn(drawn, [record for record in records if id(record) in left], held.dropped)


def _draw_usable(records: list[PreferenceRecord], num: int, seed: int, judge: Judge) -> _Drawn:
    """`num` usable records drawn by `seed`, fewer where there are no more; in the place of one that cannot be
    used another is drawn. Without such, the draw is `sample`'s of all records."""
    draw = random.Random(seed)
    left, drawn = list(range(len(records))), list[int]()
    dropped: dict[str, list[int]] = {}
    while left and len(drawn) < num:
        picked = sorted(draw.sample(left, min(num - len(drawn), len(left))))
        drawn += _usable(records, picked, judge, dropped)
        gone = set(picked)
        left = [place for place in left if place not in gone]
    return _Drawn([records[place] for place in sorted(drawn)], [records[place] for place in left], dropped)


def _usable(
    records: list[PreferenceRecord], places: Iterable[int], judge: Judge, dropped: dict[str, list[int]]
) -> list[int]:
    """Those of `places` whose record can be used; the rows of the others go to `dropped`."""
    places = list(places)
    usable = []
    for place, reason in zip(places, judge([records[place] for place in places]), strict=True):
        if reason is None:
            usable.append(place)
        else:
            dropped.setdefault(reason, []).append(records[place].row)
    return usable


def _take(records: list[PreferenceRecord], config: DataConfig, judge: Judge, report: list[str]) -> _Drawn:
    """The training pairs: all that can be used, or data.train_pairs of them, drawn."""
    if config.train_pairs is not None and config.train_pairs < len(records):
        taken = _draw_usable(records, config.train_pairs, config.seed, judge)
        report.append(f"{len(taken.drawn)} of {len(records)} training pairs drawn by data.seed={config.seed}")
        return taken
    dropped: dict[str, list[int]] = {}
    usable = _usable(records, range(len(records)), judge, dropped)
    return _Drawn([records[place] for place in usable], [], dropped)


def _without(
    train: list[PreferenceRecord], held_out: list[PreferenceRecord], report: list[str]
) -> list[PreferenceRecord]:
    """`train` without the pairs that are held out too; those that only share a prompt are counted and
    kept."""
    pairs = {content(record) for record in held_out}
    kept = [record for record in train if content(record) not in pairs]
    if len(kept) < len(train):
        report.append(f"{len(train) - len(kept)} training pairs dropped because they are held-out pairs too")
    prompts = {_prompt(record) for record in held_out}
    shared = sum(_prompt(record) in prompts for record in kept)
    if shared:
        report.append(f"{shared} training pairs share their prompt with a held-out pair (kept)")
    return kept


def content(record: PreferenceRecord) -> str:
    """Equal for pairs that are equal in all but their row number."""
    for_template = (record.tools, record.documents, record.template_kwargs)
    label = [] if record.label is None else [record.label]
    listed = [record.between, record.scores] if record.scores else []
    images = [image.identity for image in record.images]
    return _key([record.prompt, record.chosen, record.rejected, *for_template, *label, *listed, *images])


def _prompt(record: PreferenceRecord) -> str:
    return _key([record.prompt, *(image.identity for image in record.images)])


def _key(parts: Iterable[Any]) -> str:
    return json.dumps(list(parts))
