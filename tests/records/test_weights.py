"""Weights of pairs: from a column of the data to a tokenised pair; which values and settings are refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rcpo.common.errors import UserError
from rcpo.config.schema import DataConfig
from rcpo.objectives import Composition
from rcpo.records.load import load_records
from rcpo.records.record import BadRowError
from rcpo.records.weights import UNWEIGHTED, ColumnWeight, DoraWeight, Weighing, weighing_of

WEIGHT, DORA = ColumnWeight(), DoraWeight(0.5, 0.5)


def write_rows(path: Path, columns: list[dict[str, Any]]) -> str:
    """A row for each dict, which holds the columns beside prompt, chosen and rejected."""
    rows = [
        {"prompt": f"q{n}", "chosen": f" yes{n}", "rejected": f" no{n}"} | own
        for n, own in enumerate(columns)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(path: str | None, **keys: Any) -> DataConfig:
    return DataConfig(**{"source": "file", "path": path, "eval_pairs": 1, **keys})


def fault(config: DataConfig, weighing: Weighing) -> str:
    with pytest.raises(UserError) as caught:
        load_records(config, weighing)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_dora_weights_by_hand() -> None:
    """a = a_i = 1/2: 1/(1/2 + (1-p)/2p) = 2p. a = 1/4, a_i = 1/2, p = 1/3: 1/(1/4 + 1) = 4/5; p = 1: 1/a."""
    for p in (1e-9, 0.25, 0.5, 1.0):
        assert DORA.weight({"probability": p}) == pytest.approx(2 * p)
    assert DoraWeight(0.25, 0.5).weight({"probability": 1 / 3}) == pytest.approx(0.8)
    assert DoraWeight(0.25, 0.5).weight({"probability": 1}) == 4.0
    assert DoraWeight(0.25, 0.0).weight({"probability": 1e-3}) == pytest.approx(4.0)


def test_a_composition_names_its_weighing() -> None:
    assert weighing_of(Composition()) is UNWEIGHTED
    assert weighing_of(Composition(sample_weight="weight")).parts == ("weight",)
    assert weighing_of(Composition(sample_weight="dora", dora_a=0.25)) == DoraWeight(0.25, 0.5)


@pytest.mark.parametrize(
    ("weighing", "part", "value", "reason"),
    [
        (WEIGHT, "weight", None, "weight is null"),
        (WEIGHT, "weight", "", "weight is null"),
        (WEIGHT, "weight", "much", "weight is not a finite number"),
        (WEIGHT, "weight", True, "weight is not a finite number"),
        (WEIGHT, "weight", [1], "weight is not a finite number"),
        (WEIGHT, "weight", math.nan, "weight is not a finite number"),
        (WEIGHT, "weight", math.inf, "weight is not a finite number"),
        (WEIGHT, "weight", -0.5, "weight is negative"),
        (DORA, "probability", 0, "probability is not above 0 and at most 1"),
        (DORA, "probability", 1.01, "probability is not above 0 and at most 1"),
        (DORA, "probability", math.nan, "probability is not a finite number"),
    ],
)
def test_unfit_values_are_bad_rows(weighing: Weighing, part: str, value: Any, reason: str) -> None:
    with pytest.raises(BadRowError, match=f"^{reason}$"):
        weighing.weight({part: value})


def test_training_pairs_have_the_weight_of_their_row(tmp_path: Path) -> None:
    """Under the column's own name, beside the held-out file, which has no such column."""
    path = write_rows(tmp_path / "a.jsonl", [{"trust": n / 2} for n in range(4)])
    held_out = write_rows(tmp_path / "b.jsonl", [{"chosen": " else"}])
    config = config_of(path, eval_path=held_out, columns={"weight": "trust"})
    data = load_records(config, WEIGHT)
    assert [record.weight for record in data.train] == [0.0, 0.5, 1.0, 1.5]
    assert [record.weight for record in data.held_out] == [1.0]
    assert data.report[-1] == "weights: mean 0.75, from 0 to 1.5, 1 of them 0"


def test_numbers_in_a_csv_file_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,probability\nq,a,b,0.25\nr,c,d,1e-1\n")
    data = load_records(config_of(str(path), eval_path=write_rows(tmp_path / "b.jsonl", [{}])), DORA)
    assert [record.weight for record in data.train] == pytest.approx([0.5, 0.2])


def test_a_weight_column_alone_weighs_nothing(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"weight": -1}, {"weight": "x"}, {}])
    data = load_records(config_of(path))
    assert [record.weight for record in (*data.train, *data.held_out)] == [1.0] * 3


def test_bad_weights_are_counted_by_reason_or_stop(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"weight": w} for w in (1, -1, 2, None, -3, 3)])
    data = load_records(config_of(path, on_bad_row="drop"), WEIGHT)
    assert data.account.training.dropped == {"weight is negative": [1, 4], "weight is null": [3]}
    assert sorted(record.weight for record in (*data.train, *data.held_out)) == [1.0, 2.0, 3.0]
    assert "row 1 (counted from 0) cannot train: weight is negative; mend it or type" in fault(
        config_of(path), WEIGHT
    )


def test_settings_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"weight": 0} for _ in range(3)])
    assert "has no column probability, but " in fault(config_of(path), DORA)
    assert "type data.columns='{probability: NAME}'" in fault(config_of(path), DORA)
    assert fault(config_of(path, columns={"weight": "trust"}), DORA) == (
        "data.columns.weight=trust: has no effect without weight; type objective.sample_weight=weight as well"
    )
    assert fault(config_of(path, columns={"probability": "p"}), UNWEIGHTED) == (
        "data.columns.probability=p: has no effect without dora; type objective.sample_weight=dora as well"
    )
    assert fault(config_of(path), WEIGHT) == (
        "objective.sample_weight: the weight of all 2 training pairs is 0, from column weight; mend it or "
        "type objective.sample_weight=null"
    )
    assert fault(config_of(None, source="arithmetic", train_pairs=8), WEIGHT) == (
        "objective.sample_weight: data=arithmetic has no column weight; type data=file "
        "data.path=PAIRS.jsonl, or objective.sample_weight=null"
    )
