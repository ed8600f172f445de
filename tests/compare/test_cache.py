"""The cache of metrics is never older than metrics.jsonl, and never in the way."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from helpers.compare_folders import make_run
from rcpo.common.errors import UserError
from rcpo.comparison.metrics_cache import read_columns, read_metrics
from rcpo.runs.folder import RunFolder
from rcpo.runs.rows import encode_row

WANTED = ("step", "band/lower", "score/cosine", "not/there")


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return list(one) == list(other) and all(
        np.array_equal(values, other[name], equal_nan=True) for name, values in one.items()
    )


def test_columns_are_what_the_run_folder_reads(tmp_path: Path) -> None:
    """Row by row, infinities and nan included; nan also where a row has no value."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "x": math.inf, "y": math.nan}, {"step": 2, "x": -math.inf}, {"step": 3, "y": 0.1}]
    path.write_text("".join(encode_row(row) + "\n" for row in rows))
    columns = read_columns(path)
    for idx, row in enumerate(RunFolder(tmp_path).rows(path)):
        for name, values in columns.items():
            assert np.array_equal(values[idx], row.get(name, math.nan), equal_nan=True)


def test_the_cache_gives_the_same_and_is_used(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    cache = run / "metrics.parquet"
    first = read_metrics(run / "metrics.jsonl", WANTED)
    assert sorted(first) == sorted(WANTED[:3])
    assert cache.is_file()
    written = cache.stat().st_mtime_ns
    again = read_metrics(run / "metrics.jsonl", WANTED)
    assert {name: values.tolist() for name, values in again.items()} == {
        name: values.tolist() for name, values in first.items()
    }
    assert cache.stat().st_mtime_ns == written
    assert sorted(path.name for path in run.iterdir() if path.name.startswith((".", "metrics"))) == [
        "metrics.jsonl",
        "metrics.parquet",
    ]
    # What is in the cache is what is read: a cache with other numbers shows.
    content = (run / "metrics.jsonl").read_bytes()
    stat = (run / "metrics.jsonl").stat()
    (run / "metrics.jsonl").write_bytes(b"x" * len(content))
    os.utime(run / "metrics.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert same(read_metrics(run / "metrics.jsonl", WANTED), again)


@pytest.mark.parametrize("how", ["grown", "touched", "damaged cache", "cache of another kind"])
def test_what_has_changed_is_read_again(tmp_path: Path, how: str) -> None:
    metrics = make_run(tmp_path / "run") / "metrics.jsonl"
    cache = metrics.with_suffix(".parquet")
    assert len(read_metrics(metrics, WANTED)["step"]) == 8
    lines = metrics.read_text().splitlines(keepends=True)
    if how == "grown":
        metrics.write_text("".join(lines) + json.dumps({"step": 9}) + "\n")
    elif how == "touched":  # as a resumed run does: other rows, the same size
        metrics.write_text("".join(lines).replace('"step": 8', '"step": 7'))
        os.utime(metrics, ns=(0, 5))
    elif how == "damaged cache":
        cache.write_bytes(cache.read_bytes()[:100])
    else:
        cache.write_bytes(b"")
    steps = read_metrics(metrics, WANTED)["step"].tolist()
    assert steps == {"grown": [*range(1, 10)], "touched": [*range(1, 8), 7]}.get(how, [*range(1, 9)])


def test_where_no_cache_can_be_written_the_numbers_come_all_the_same(tmp_path: Path) -> None:
    """Its place is taken by a folder, which root cannot replace either."""
    metrics = make_run(tmp_path / "run") / "metrics.jsonl"
    (metrics.parent / "metrics.parquet").mkdir()
    assert len(read_metrics(metrics, WANTED)["step"]) == 8
    assert [path.name for path in metrics.parent.glob(".*")] == []


def test_a_run_that_is_being_written_loses_its_unfinished_line_only(tmp_path: Path) -> None:
    metrics = make_run(tmp_path / "run") / "metrics.jsonl"
    with metrics.open("a") as stream:
        stream.write('{"step": 9, "band/lo')
    assert read_metrics(metrics, WANTED)["step"].tolist() == [*range(1, 9)]
    with metrics.open("a") as stream:
        stream.write('wer": 1.5}\n')
    assert read_metrics(metrics, WANTED)["band/lower"].tolist()[-1] == 1.5


def test_no_file_is_no_columns_and_no_row_is_an_error(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl", WANTED) == {}
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_metrics(tmp_path / "metrics.jsonl", WANTED)
