"""The one reader of metrics.jsonl and eval.jsonl: whole, from its end, and as it grows, by one rule."""

import math
from pathlib import Path

import pytest

from rcpo.common.errors import UserError
from rcpo.runs.rows import (
    TAIL_BYTES,
    GrowingRows,
    decode_row,
    encode_row,
    read_json_rows,
    read_last_rows,
    read_rows,
)

NO_ROWS = (
    "{", "", "3", "null", "[1]", '{"loss": 1.0}', '{"step": null}', '{"step": 2, "x": "infinite"}',
    '{"step": 2, "x": [1]}', '{"step": 2}{',
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(rows: list[dict[str, float]]) -> list[float]:
    return [row["step"] for row in rows]


@pytest.mark.parametrize("line", NO_ROWS)
def test_damage_is_told_by_who_reads_all_and_passed_over_by_who_looks_at_the_end(
    path: Path, line: str
) -> None:
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"."):
        decode_row(line)
    with pytest.raises(UserError, match=r"line 2 is damaged; mend it or remove it"):
        read_rows(path)
    assert steps(read_last_rows(path)) == [1, 3]
    assert steps(GrowingRows(path).read_new()[1]) == [1, 3]


def test_an_unfinished_line_is_not_there_yet_for_all(path: Path) -> None:
    """Cut at any byte, also inside a character of several; the growing file gives each row once."""
    whole = '{"step": 1}\n{"step": 2, "größe": null}\n'.encode()
    growing, given = GrowingRows(path), []
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        expected = [1, 2][: whole[:length].count(b"\n")]
        given += growing.read_new()[1]
        for rows in (read_rows(path), list(read_json_rows(path)), read_last_rows(path), given):
            assert steps(rows) == expected
    assert math.isnan(given[1]["größe"])


def test_a_rewound_file_comes_again_and_says_so(path: Path) -> None:
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    growing = GrowingRows(path)
    assert [
        steps(rows) if not again else None for again, rows in (growing.read_new(), growing.read_new())
    ] == [
        [1, 2, 3],
        [],
    ]
    path.write_text('{"step": 1}\n')
    again, rows = growing.read_new()
    assert again
    assert steps(rows) == [1]


def test_the_end_of_a_long_file_is_its_last_whole_rows(path: Path) -> None:
    """The first line of the part that is read is cut, and left out."""
    lines = [encode_row({"step": step, "x": 1 / 3}) + "\n" for step in range(5000)]
    path.write_text("".join(lines))
    rows = read_last_rows(path)
    assert rows == read_rows(path)[-len(rows) :]
    num_bytes = sum(map(len, lines[-len(rows) :]))
    assert TAIL_BYTES - len(lines[-1]) <= num_bytes <= TAIL_BYTES


def test_no_file_is_no_rows(path: Path) -> None:
    assert read_rows(path) == list(read_json_rows(path)) == read_last_rows(path) == []
    assert GrowingRows(path).read_new() == (False, [])
