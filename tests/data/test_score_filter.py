"""data.filter: which training pairs their scores leave out, and files of scores that do not belong."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import forked
from helpers.inputs import config_of, fault
from rcpo.commands.train import prepare
from rcpo.config.schema import Config
from rcpo.data.score_file import TRAIN, read_pair_scores, write_pair_scores
from rcpo.quality.ches import ModelScores
from rcpo.quality.pairs import describe_pairs
from rcpo.quality.score_table import make_table
from rcpo.training.read_inputs import read_inputs, read_pairs

NUM_PAIRS = 30


def score(path: Path, config: Config, ches: Sequence[float] | None = None) -> None:
    """Scores of the training pairs of `config`: CHES 0, 1, 2, ..., per token the reverse, margin as CHES."""
    pairs = read_pairs(config).train.pairs
    values = [float(num) for num in range(len(pairs))] if ches is None else list(ches)
    scores = [ModelScores(value, -value, value, 0.0) for value in values]
    write_pair_scores(
        path, make_table({TRAIN: (describe_pairs(pairs), scores)}), {"model.path": "builtin:tiny"}
    )


def filtered(path: Path, **limits: Any) -> Config:
    """The 30 word problems with limits."""
    data = {
        "source": "arithmetic", "train_pairs": NUM_PAIRS, "eval_pairs": 10,
        "filter": {"scores": str(path), **limits},
    }  # fmt: skip
    return config_of(data=data)


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"ches_max_percentile": 50}, range(15)),
        ({"ches_max_percentile": 100}, range(30)),
        ({"ches_norm_max_percentile": 50}, range(15, 30)),
        ({"ches_min_percentile": 50}, range(15, 30)),
        ({"ches_min_percentile": 0}, range(30)),
        ({"ches_norm_min_percentile": 50}, range(15)),
        ({"ches_min_percentile": 20, "ches_max_percentile": 80}, range(6, 24)),
        ({"ches_near_percentile": 0, "nearest": 5}, range(5)),
        ({"ches_near_percentile": 100, "nearest": 5}, range(25, 30)),
        ({"ches_near_percentile": 50, "nearest": 4}, range(13, 17)),
        ({"ches_near_percentile": 50, "nearest": 5}, range(12, 17)),
        ({"ches_near_percentile": 10, "nearest": 8}, range(8)),
        ({"ches_norm_near_percentile": 0, "nearest": 6}, range(24, 30)),
        ({"ches_near_percentile": 0, "nearest": 4, "margin_min": 10.0}, range(10, 14)),
        ({"ches_near_percentile": 7, "nearest": 30}, range(30)),
        ({"margin_min": 4.0}, range(4, 30)),
        ({"margin_max": 9.0}, range(10)),
        ({"margin_min": 4.0, "ches_max_percentile": 50}, range(4, 15)),
    ],
)
def test_pairs_within_all_limits_train(tmp_path: Path, limits: dict[str, float], kept: range) -> None:
    """Scores 0 to 29: the median is 14.5, the 20th percentile 5.8; a score equal to a limit is within it.
    Places are the scores here: near 14.5 are 13 to 16, and of 12 and 17, as near, the lower one; near 2.9 are
    0 to 5, then 6 and 7. Held-out pairs all stay."""
    plain = config_of()
    score(tmp_path / "s.parquet", plain)
    everything, inputs = read_inputs(plain), read_inputs(filtered(tmp_path / "s.parquet", **limits))
    assert inputs.train == [everything.train[place] for place in kept]
    assert inputs.held_out == everything.held_out
    assert f"data.filter: {len(kept)} of 30 training pairs are kept" in inputs.report
    assert inputs.report[-2] == f"{len(kept)} training pairs, 10 held-out pairs"


def test_the_log_says_what_each_limit_left_out(tmp_path: Path) -> None:
    score(tmp_path / "s.parquet", config_of())
    report = read_inputs(filtered(tmp_path / "s.parquet", margin_min=4, ches_max_percentile=50)).report
    assert [line for line in report if line.startswith("data.filter")] == [
        "data.filter: scores by model.path=builtin:tiny",
        "data.filter.ches_max_percentile=50: leaves out 15 of 30 training pairs, with ches > 14.5",
        "data.filter.margin_min=4: leaves out 4 of 30 training pairs, with margin < 4",
        "data.filter: 11 of 30 training pairs are kept",
    ]


def test_the_nearest_are_counted_by_place_not_by_value(tmp_path: Path) -> None:
    """Scores 0, 1, 4, 9, ..., 841: the middle ten places, 10 to 19, hold 100 to 361. By value 81 would be
    nearer to the median, 210.5, than 361. Equal scores keep their order."""
    path = tmp_path / "s.parquet"
    everything = read_inputs(config_of()).train
    score(path, config_of(), [float(num) ** 2 for num in range(NUM_PAIRS)])
    inputs = read_inputs(filtered(path, ches_near_percentile=50, nearest=10))
    assert inputs.train == everything[10:20]
    assert "data.filter.ches_near_percentile=50 nearest=10: keeps ches from 100 to 361" in inputs.report
    score(path, config_of(), [1.0] * NUM_PAIRS)
    assert read_inputs(filtered(path, ches_near_percentile=0, nearest=4)).train == everything[:4]


def test_rows_are_found_whatever_their_order_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    score(path, config_of())
    expected = read_inputs(filtered(path, margin_max=9.0)).train
    table, made_with = read_pair_scores(str(path), "x")
    write_pair_scores(path, table.take(list(range(NUM_PAIRS))[::-1]), made_with)
    assert read_inputs(filtered(path, margin_max=9.0)).train == expected


def test_scores_of_other_rows_or_tokens_are_refused(tmp_path: Path) -> None:
    """Scored with fewer pairs, and with prompts that were cut."""
    path = tmp_path / "s.parquet"
    few = config_of(data={"source": "arithmetic", "train_pairs": 20, "eval_pairs": 10})
    score(path, few)
    assert re.match(
        r"data.filter.scores=\S+: has no scores of training row 20 \(scored with model.path=builtin:tiny\); "
        r"type rcpo score ",
        fault(filtered(path, margin_max=9.0)),
    )
    score(path, config_of(train={"device": "cpu", "pairs_per_step": 4, "max_length": 16}))
    assert "has other tokens now than when it was scored" in fault(filtered(path, margin_max=9.0))


def test_files_that_hold_no_scores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    assert fault(filtered(path, margin_max=9.0)).startswith(
        f"data.filter.scores={path}: no such file; type rcpo score "
    )
    path.write_text("no parquet")
    assert f"data.filter.scores={path}: is no file that rcpo score wrote" in fault(
        filtered(path, margin_max=1)
    )
    score(path, config_of())
    table, made_with = read_pair_scores(str(path), "x")
    write_pair_scores(path, table.drop_columns(["ches"]), made_with)
    assert "is no file that rcpo score wrote" in fault(filtered(path, margin_max=9.0))


def test_limits_that_leave_too_little_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    score(path, config_of())
    assert fault(filtered(path, margin_min=30.0)) == (
        "data.filter.margin_min=30: leaves none of 30 training pairs; type wider limits"
    )
    assert "train.pairs_per_step=4: there are only 3 training pairs" in fault(filtered(path, margin_max=2.0))
    assert fault(filtered(path, ches_near_percentile=50, nearest=9, margin_max=7.0)) == (
        "data.filter.nearest=9: there are only 8 training pairs to choose from; "
        "type data.filter.nearest=8 or less"
    )


@pytest.mark.parametrize(
    ("filter_keys", "said"),
    [
        ({"margin_min": 1.0}, "data.filter.margin_min=1: needs the pairs' scores; type data.filter.scores="),
        ({"scores": "s.parquet"}, "data.filter.scores=s.parquet: leaves nothing out without a limit; type "),
        (
            {"scores": "s", "margin_min": 2.0, "margin_max": 1.0},
            "data.filter.margin_min=2: must be at most data.filter.margin_max=1; type ",
        ),
        ({"scores": "s", "ches_max_percentile": 0}, "data.filter.ches_max_percentile=0: must be greater "),
        (
            {"scores": "s", "ches_min_percentile": 100},
            "data.filter.ches_min_percentile=100: must be less ",
        ),
        (
            {"scores": "s", "ches_norm_min_percentile": 60, "ches_norm_max_percentile": 40},
            "data.filter.ches_norm_min_percentile=60: must be at most "
            "data.filter.ches_norm_max_percentile=40; type data.filter.ches_norm_min_percentile=null",
        ),
        ({"nearest": 4}, "data.filter.nearest=4: needs the pairs' scores; type data.filter.scores="),
        (
            {"scores": "s", "nearest": 4},
            "data.filter.nearest=4: needs the percentile to be near to; type "
            "data.filter.ches_norm_near_percentile=50 as well",
        ),
        (
            {"scores": "s", "ches_near_percentile": 0},
            "data.filter.ches_near_percentile=0: needs the number of pairs; type data.filter.nearest=512 as ",
        ),
        (
            {"scores": "s", "nearest": 4, "ches_near_percentile": 0, "ches_norm_near_percentile": 50},
            "data.filter.ches_near_percentile=0 data.filter.ches_norm_near_percentile=50: only one can be "
            "the middle; type data.filter.ches_near_percentile=null",
        ),
    ],
)
def test_keys_that_make_no_filter_are_refused(filter_keys: dict[str, Any], said: str) -> None:
    data = {"source": "arithmetic", "train_pairs": 30, "filter": filter_keys}
    with pytest.raises(Exception, match=f"^{re.escape(said)}"):
        config_of(data=data)


def test_words_of_the_command_line_reach_the_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No + is needed, with any data option; the frozen path does not depend on the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.parquet").write_text("")
    words = ["data.filter.scores=s.parquet", "data.filter.ches_max_percentile=95"]
    for data in (["data=arithmetic"], ["data=file", "data.path=pairs.jsonl"]):
        config = prepare([*data, *words])
        assert config is not None
        given = dataclasses.asdict(config.data.filter)
        assert given.pop("scores") == str(tmp_path / "s.parquet")
        assert given.pop("ches_max_percentile") == 95
        assert not any(given.values())


def test_a_filtered_run_says_so_where_its_user_looks(tmp_path: Path) -> None:
    """From rcpo score to rcpo train: the 95th percentile of 64 lies between the 60th and the 61st."""
    data = ["data.train_pairs=64", "data.eval_pairs=8"]
    limit = ["data.filter.scores=scores.parquet", "data.filter.ches_max_percentile=95"]
    for words in (
        ["score", *data],
        ["train", *data, *limit, "train.steps=1", "tracking=none", "run_dir=run"],
    ):
        done = forked.rcpo(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    limited = "data.filter.ches_max_percentile=95: leaves out 4 of 64 training pairs, with ches > "
    assert sum(line.startswith(limited) for line in done.stdout.splitlines()) == 1
    assert "\ndata.filter: 60 of 64 training pairs are kept\n" in done.stdout
    assert done.stdout.startswith("objective=dpo calibration=off  tiny on arithmetic: 60 training pairs")
