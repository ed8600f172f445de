"""Weights of pairs: from a column of the data to a tokenised pair; which values and settings are refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_tokenizers import make_bpe
from rcpo.common.errors import UserError
from rcpo.config.schema import DataConfig
from rcpo.data.tokenize import tokenize_records
from rcpo.objectives import Composition
from rcpo.records.load import load_records
from rcpo.records.record import BadRowError
from rcpo.records.weights import (
    UNWEIGHTED,
    ColumnWeight,
    DoraSidesWeight,
    DoraWeight,
    Weighing,
    weighing_of,
)

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


MEAN, PRODUCT = DoraSidesWeight(0.5, 0.5, "mean"), DoraSidesWeight(0.5, 0.5, "product")
LIST = {
    "prompt": "q",
    "responses": [" a", " bb", " ccc"],
    "scores": [1, 3, 2],
    "probabilities": [0.125, 0.5, 0.25],
}
HELD_OUT = {"prompt": "h", "chosen": " a", "rejected": " b"}


def weights_of(folder: Path, weighing: Weighing, rows: list[dict[str, Any]], lists: str) -> list[float]:
    """Of what a run trains on, in its order."""
    path, held_out = folder / "rows.jsonl", folder / "held_out.jsonl"
    for file, own in ((path, rows), (held_out, [HELD_OUT])):
        file.write_text("".join(json.dumps(row) + "\n" for row in own))
    config = config_of(str(path), eval_path=str(held_out), lists=lists)
    records = load_records(config, weighing).train
    pairs = tokenize_records(records, make_bpe(), 64, None, "error", lists=lists).pairs
    return [float(weight) for weight in pairs.arrays.weights]


@pytest.mark.parametrize(
    ("weighing", "whole", "best_worst", "all_pairs"),
    [
        (MEAN, [7 / 12] * 2, [5 / 8], [3 / 4, 5 / 8, 3 / 8]),
        (PRODUCT, [1 / 8] * 2, [1 / 4], [1 / 2, 1 / 4, 1 / 8]),
    ],
    ids=["mean", "product"],
)
def test_weights_of_a_list_s_responses_by_hand(
    weighing: Weighing,
    whole: list[float],
    best_worst: list[float],
    all_pairs: list[float],
    tmp_path: Path,
) -> None:
    """a = a_i = 1/2: a weight is 2p, so 1, 1/2 and 1/4, best first. A whole list, in two slots, has the mean
    or the product of all; a pair of two of its responses that of these. The row's order does not matter."""
    turned = {key: value[::-1] if isinstance(value, list) else value for key, value in LIST.items()}
    as_text = {key: str(value) for key, value in LIST.items()}  # as CSV has it
    for row in (LIST, turned, as_text):
        assert weights_of(tmp_path, weighing, [row], "whole") == whole
        assert weights_of(tmp_path, weighing, [row], "best_worst") == best_worst
        assert weights_of(tmp_path, weighing, [row], "all_pairs") == all_pairs


def test_a_list_of_two_weighs_what_its_pair_weighs(tmp_path: Path) -> None:
    """To the last bit, at odd numbers, and beside longer lists."""
    p_w, p_l = 0.3123, 0.7771
    pair = {"prompt": "q", "chosen": " a", "rejected": " b"}
    pair |= {"probability_chosen": p_w, "probability_rejected": p_l}
    two = {"prompt": "q", "responses": [" b", " a"], "scores": [0, 1], "probabilities": [p_l, p_w]}
    for how in ("mean", "product"):
        weighing = DoraSidesWeight(0.3, 0.6, how)
        (expected,) = weights_of(tmp_path, weighing, [pair], "best_worst")
        for lists in ("whole", "best_worst", "all_pairs"):
            assert weights_of(tmp_path, weighing, [two], lists) == [expected]
    one_for_all = {key: value for key, value in LIST.items() if key != "probabilities"} | {
        "probability": 0.25
    }
    assert weights_of(tmp_path, DORA, [one_for_all], "whole") == [0.5, 0.5]


@pytest.mark.parametrize(
    ("probabilities", "reason"),
    [
        ([0.5, 0.5], "there are 2 probabilities of 3 responses"),
        (None, "probabilities is null, or text that is no list"),
        (0.5, "probabilities is float, not a list"),
        ([0.5, 0.5, 0], "one of the probabilities is not above 0 and at most 1"),
        ([0.5, 0.5, None], "one of the probabilities is null"),
        ([0.5, "much", 1], "one of the probabilities is not a finite number"),
    ],
)
def test_unfit_probabilities_of_a_list_are_bad_rows(probabilities: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [LIST, LIST | {"prompt": "r", "probabilities": probabilities}, LIST | {"prompt": "s"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_records(config_of(str(path), lists="whole", on_bad_row="drop"), MEAN)
    assert data.account.training.dropped == {reason: [1]}


def test_lists_without_probabilities_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {key: value for key, value in LIST.items() if key != "probabilities"}
    path.write_text("".join(json.dumps(row | {"prompt": f"q{n}"}) + "\n" for n in range(3)))
    said = fault(config_of(str(path)), MEAN)
    assert "has no column probabilities, but prompt, responses, scores; type data.columns='{prob" in said
    assert fault(config_of(str(path), columns={"probabilities": "p"}), DORA) == (
        "data.columns.probabilities=p: has no effect without dora_mean; type "
        "objective.sample_weight=dora_mean as well"
    )
