"""The file of scores: a parquet table with a row for each pair, written by `rcpo score`, read by the filter.

Owns the columns and what makes a file unfit. Columns beside `split` (train or held_out) are those of
`PairFacts` and `ModelScores`, and `margin` = z_w - z_l.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rcpo.common.errors import UserError
from rcpo.common.files import replacing

TRAIN, HELD_OUT = "train", "held_out"
MADE_WITH = b"rcpo"
"""Name of the parquet metadata that hold, as JSON, what the scores were made with."""
SCHEMA = pa.schema(
    [
        ("split", pa.string()), ("row", pa.int64()), ("digest", pa.string()),
        ("ches", pa.float64()), ("ches_norm", pa.float64()),
        ("z_w", pa.float64()), ("z_l", pa.float64()), ("margin", pa.float64()),
        ("len_w", pa.int64()), ("len_l", pa.int64()), ("length_difference", pa.int64()),
        ("shared_prefix", pa.int64()), ("edit_distance", pa.int64()),
        ("repeats", pa.int64()), ("contradicts", pa.int64()),
    ]
)  # fmt: skip
ADVICE = "type rcpo score with this run's model=, data= and train.max_length= to write one"


class PairScoreFile(NamedTuple):
    table: pa.Table
    made_with: dict[str, Any]
    """model.path, model.dtype, train.max_length, ... of the scoring."""

    def of_split(self, split: str) -> dict[str, list[Any]]:
        """The columns of one split's rows."""
        columns: dict[str, list[Any]] = self.table.filter(
            pa.compute.equal(self.table["split"], split)
        ).to_pydict()
        return columns


def write_pair_scores(path: Path, table: pa.Table, made_with: dict[str, Any]) -> None:
    """Raises OSError."""
    with replacing(path) as beside:
        pq.write_table(table.replace_schema_metadata({MADE_WITH: json.dumps(made_with).encode()}), beside)


def read_pair_scores(path: str, key: str) -> PairScoreFile:
    """What `write_pair_scores` wrote; UserError, which names the `key` that gave the path, where it is no
    such file."""
    if not Path(path).is_file():
        raise UserError(f"{key}={path}: no such file; {ADVICE}")
    try:
        table = pq.read_table(path, partitioning=None)
        made_with = json.loads((table.schema.metadata or {})[MADE_WITH])
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, OSError, KeyError, ValueError):
        raise UserError(f"{key}={path}: is no file that rcpo score wrote; {ADVICE}") from None
    return PairScoreFile(table, made_with)
