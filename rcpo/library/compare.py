"""`rcpo.compare`: runs side by side from Python, as `rcpo compare` has them."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from rcpo.comparison.groups import Comparison as Compared
    from rcpo.comparison.table import GroupLine


class HasPath(Protocol):
    """A `Run` or a `Sweep`."""

    path: Path


Place: TypeAlias = "str | os.PathLike[str] | HasPath"


class Comparison:
    """Runs side by side, seeds merged into groups, with differences to calibration=off."""

    def __init__(self, lines: "list[GroupLine]", compared: "Compared") -> None:
        self._lines, self._compared = lines, compared

    @property
    def table(self) -> "pd.DataFrame":
        """One line a group, the columns of the terminal's table as numbers: means over n seeds; vs_off is the
        difference of chosen to calibration=off, p its p-value, adjusted for all groups."""
        import pandas as pd

        from rcpo.comparison.labels import NONE
        from rcpo.comparison.table import columns_of

        groups, usual = self._compared.groups, self._compared.usual
        keys = dict.fromkeys([*usual, *(key for group in groups for key in group.shown)])
        num_kinds = len({group.kind for group in groups})
        return pd.DataFrame(
            {
                "run": line.group.name,
                "objective": line.group.objective,
                "calibration": line.group.calibration,
                **({"data": line.group.kind} if num_kinds > 1 else {}),
                **{key: line.group.shown.get(key, usual.get(key, NONE)) for key in keys},
                "n": len(line.group.runs),
                **{column.name: line.means[column.name][0] for column in columns_of(self._compared)},
                "vs_off": line.group.differences["chosen"].mean if line.group.differences else math.nan,
                "p": line.group.p_holm,
            }
            for line in self._lines
        )

    @property
    def records(self) -> "pd.DataFrame":
        """The same with everything that `rcpo compare --csv` has: standard errors, intervals, notes."""
        import pandas as pd

        return pd.DataFrame([line.flat() for line in self._lines])

    @property
    def left_out(self) -> list[tuple[Path, str]]:
        """Runs that are in no mean, each with the reason."""
        return [(item.run.path, item.reason) for item in self._compared.left_out]

    def markdown(self) -> str:
        """The table, what it says in words, and its notes."""
        from rcpo.comparison.forms import as_markdown

        return as_markdown(self._lines, self._compared)

    def html(self, path: str | os.PathLike[str], ches: Literal["auto", "yes", "no"] = "auto") -> Path:
        """Write the report of `rcpo compare --html`, one file that needs no network; returns its path.
        `ches`: whether the model is loaded to score the pairs that fell most."""
        from rcpo.report.page import make_page

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, make_page(self._lines, self._compared, ches))
        return target

    def __repr__(self) -> str:
        return self.markdown()

    _repr_markdown_ = markdown


def compare(
    paths: "Place | Iterable[Place]", where: Sequence[str] = (), sort: str | None = None
) -> Comparison:
    """Compare runs: run folders, sweep folders, folders of runs, patterns, or `Run` and `Sweep` objects.

        rcpo.compare("runs").table
        rcpo.compare([first, second], sort="-chosen").html("report.html")
        rcpo.compare("sweeps-out/demo", where=["objective=dpo,simpo"])

    Raises UserError where a path holds no run, or no run fulfils `where`.
    """
    from rcpo.comparison.find import find_runs
    from rcpo.comparison.groups import compare_runs
    from rcpo.comparison.load import load_run
    from rcpo.comparison.select import select
    from rcpo.comparison.table import make_lines

    is_one = isinstance(paths, str | os.PathLike) or hasattr(paths, "path")
    places: list[Any] = [paths] if is_one else list(paths)  # type: ignore[arg-type]
    if not places:
        raise UserError("compare: names no run; give run folders, a sweep folder or Run objects")
    words = [os.fspath(getattr(place, "path", place)) for place in places]
    runs = [load_run(path) for path in find_runs(words)]
    compared = compare_runs(select(runs, [where] if isinstance(where, str) else where))
    return Comparison(make_lines(compared, sort), compared)
