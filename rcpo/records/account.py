"""What became of every row: read, dropped by reason, left out, held out, trained on.

Owns the one account of rows that the console, the log, run.json and `rcpo data` show. Does not decide:
`rcpo.records.load`, `rcpo.records.selection`, `rcpo.data.tokenize` and `rcpo.data.filter` do.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

LOST = "more than half of the data is lost: "
"""How a warning begins."""
ROWS_SHOWN = 3
"""Row numbers that a line shows for a reason."""


@dataclass(frozen=True)
class RowAccount:
    """The rows of one place. read = dropped + identical + undrawn + filtered + held_out + trained."""

    place: str
    read: int
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Numbers of rows that cannot be used, by reason, in the order in which they were found."""
    identical: int = 0
    """Rows of the training place that are held-out pairs too."""
    undrawn: int = 0
    """Rows that data.train_pairs or data.eval_pairs did not draw."""
    filtered: int = 0
    """Rows that data.filter left out."""
    held_out: int = 0
    trained: int = 0
    flipped: int = 0
    """Of those that are trained on, rows whose labels data.flip has exchanged."""

    @property
    def num_dropped(self) -> int:
        return sum(map(len, self.dropped.values()))

    @property
    def dropped_share(self) -> float:
        """Of the rows that were looked at: nobody has asked of the others whether they can be used."""
        return self.num_dropped / max(1, self.read - self.undrawn)

    def with_dropped(self, dropped: dict[str, list[int]]) -> "RowAccount":
        """The account with further dropped rows."""
        merged = {reason: list(rows) for reason, rows in self.dropped.items()}
        for reason, rows in dropped.items():
            merged.setdefault(reason, []).extend(rows)
        return dataclasses.replace(self, dropped=merged)

    def as_json(self) -> dict[str, Any]:
        dropped = [
            {"reason": reason, "rows": len(rows), "first": sorted(rows)[:ROWS_SHOWN]}
            for reason, rows in by_number(self.dropped)
        ]
        return dataclasses.asdict(self) | {"dropped": dropped}

    def lines(self) -> list[str]:
        """In the order of what happened; what is zero is not said."""
        dropped = (
            f"{len(rows)} dropped because {reason} ({_rows(rows)})"
            for reason, rows in by_number(self.dropped)
        )
        happened = [
            *dropped,
            *_counted(self.identical, "dropped because they are held-out pairs too"),
            *_counted(self.undrawn, "not drawn"),
            *_counted(self.filtered, "left out by data.filter"),
        ]
        rest = [*_counted(self.held_out, "held out"), *_counted(self.trained, "to train on")]
        rest += _counted(self.flipped, "of these with labels exchanged by data.flip")
        if not happened:
            return [f"{self.place}: {', '.join([f'{self.read} rows read', *rest])}"]
        return [
            f"{self.place}: {self.read} rows read",
            *(f"  {line}" for line in happened),
            f"  {', '.join(rest)}",
        ]


@dataclass(frozen=True)
class Account:
    """Of a run's data."""

    training: RowAccount
    held_out: RowAccount | None = None
    """Of the held-out pairs' own place; None where they are drawn from the training rows."""
    held_out_rows: list[int] = field(default_factory=list)
    """Row numbers of the held-out pairs, in their order."""

    @property
    def has_losses(self) -> bool:
        """Whether rows of any place are neither trained on nor held out."""
        places = [self.training, *([] if self.held_out is None else [self.held_out])]
        return any(place.read > place.trained + place.held_out for place in places)

    def lines(self) -> list[str]:
        lines = self.training.lines()
        if self.held_out is not None:
            lines += self.held_out.lines()
        return lines

    def warnings(self) -> list[str]:
        """Where more than half of a place's rows are lost."""
        places = [self.training, *([] if self.held_out is None else [self.held_out])]
        return [
            f"{LOST}{place.num_dropped} of {place.read - place.undrawn} rows of {place.place} are dropped "
            f"({place.dropped_share:.0%})"
            for place in places
            if place.dropped_share > 0.5
        ]

    def after_filter(self, kept: int) -> "Account":
        """With `kept` training pairs after data.filter."""
        filtered = self.training.trained - kept
        return dataclasses.replace(
            self, training=dataclasses.replace(self.training, filtered=filtered, trained=kept)
        )

    def after_flip(self, flipped: int) -> "Account":
        """With the labels of so many training rows exchanged."""
        return dataclasses.replace(self, training=dataclasses.replace(self.training, flipped=flipped))

    def as_json(self) -> dict[str, Any]:
        """For run.json and `rcpo data --json`: of the dropped rows their counts by reason, with the first of
        each."""
        return {
            "training": self.training.as_json(),
            "held_out": None if self.held_out is None else self.held_out.as_json(),
            "held_out_rows": self.held_out_rows,
        }


def account_of(tree: dict[str, Any]) -> Account:
    """What `dataclasses.asdict` gave. Raises TypeError and KeyError where it is none."""
    held_out = tree["held_out"]
    return Account(
        RowAccount(**tree["training"]),
        None if held_out is None else RowAccount(**held_out),
        tree["held_out_rows"],
    )


def by_number(dropped: dict[str, list[int]]) -> list[tuple[str, list[int]]]:
    """Reasons with their rows, the most frequent first."""
    return sorted(dropped.items(), key=lambda item: -len(item[1]))


def why(dropped: dict[str, list[int]]) -> str:
    """The reasons in brackets, for an error: " (80 dropped because ..., 3 dropped because ...)"; empty where
    there are none."""
    reasons = ", ".join(f"{len(rows)} dropped because {reason}" for reason, rows in by_number(dropped)[:3])
    return f" ({reasons})" if reasons else ""


def _counted(number: int, what: str) -> Iterable[str]:
    return [f"{number} {what}"] if number else []


def _rows(rows: list[int]) -> str:
    shown = ", ".join(map(str, sorted(rows)[:ROWS_SHOWN]))
    more = ", ..." if len(rows) > ROWS_SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"
