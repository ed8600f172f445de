"""The held-out pairs of a run as a table: their numbers from RUN/eval, their words from the data."""

from pathlib import Path
from typing import TYPE_CHECKING

from rcpo.common.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from rcpo.records.record import Messages, PreferenceRecord

TEXTS = ("prompt", "chosen", "rejected")


def pair_table(path: Path) -> "pd.DataFrame":
    """One row a pair, at the last evaluation. Raises UserError where the run has no per-pair results."""
    import pandas as pd

    from rcpo.comparison.held_out import held_out_records
    from rcpo.comparison.load import load_run

    run = load_run(path)
    if run.pairs is None:
        raise UserError(f"{path}: has no per-pair results; {run.problem or 'it has evaluated nothing yet'}")
    found = held_out_records(run)
    r_w, r_l = run.pairs.r_w, run.pairs.r_l
    start_w, start_l = run.pairs.start
    if isinstance(found, str):
        texts: dict[str, list[str | None] | None] = dict.fromkeys(TEXTS)
    else:
        texts = {part: [_text_of(record, part) for record in found] for part in TEXTS}
    table = pd.DataFrame({**texts, "z_w": start_w + r_w, "z_l": start_l + r_l, "r_w": r_w, "r_l": r_l})
    if isinstance(found, str):
        table.attrs["no_text"] = found
    return table


def _text_of(record: "PreferenceRecord", part: str) -> str | None:
    """None where a single answer has no such side."""
    if record.label is not None and part == ("rejected" if record.label else "chosen"):
        return None
    return _text(getattr(record, part))


def _text(part: "str | Messages") -> str:
    """Plain text as it is; of messages, one turn a line behind its role, a single turn alone."""
    if isinstance(part, str):
        return part
    if len(part) == 1:
        return part[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in part)
