"""From facts and scores of pairs to the table that `rcpo.data.score_file` writes and reads."""

from collections.abc import Sequence

import pyarrow as pa

from rcpo.data.score_file import SCHEMA
from rcpo.quality.ches import ModelScores
from rcpo.quality.pairs import PairFacts


def make_table(parts: dict[str, tuple[Sequence[PairFacts], Sequence[ModelScores]]]) -> pa.Table:
    """The table of facts and scores by split."""
    rows = [
        {"split": split, **facts._asdict(), **model._asdict(), "margin": model.z_w - model.z_l}
        for split, both in parts.items()
        for facts, model in zip(*both, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)
