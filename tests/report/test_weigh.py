"""DoRA's weights from `rcpo weigh`: against a known density ratio, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from helpers.forked import rcpo
from helpers.two_sources import draw, recover
from rcpo.cli import dispatch
from rcpo.common.errors import UserError
from rcpo.objectives import Composition
from rcpo.quality.source import at_equal_shares, reliability
from rcpo.records.arithmetic import arithmetic_records
from rcpo.records.record import BadRowError
from rcpo.records.weights import OF_SIDES, DoraSidesWeight, weighing_of


@pytest.mark.ci("slow")
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_weights_are_those_of_the_density_ratio(share: float) -> None:
    """Within bounds that a wrong prior ratio breaks: at 1 : 9 gamma = 1 makes the weights far too small."""
    drawn = draw(3000, share)
    found = recover(drawn, "platt")
    assert found.correlation > 0.9
    assert found.error < 0.2
    assert abs(found.bias) < 0.13
    if share == 0.1:
        assert recover(drawn, "platt", 1.0).bias < -0.25


def test_the_prior_ratio_by_hand() -> None:
    """p = .1 where 9 others come to one of the target: 9 * .1/(9 * .1 + .9) = 1/2."""
    assert at_equal_shares(np.array([0.1, 0.5]), 9.0) == pytest.approx([0.5, 0.9])


def test_calibration_error_by_hand() -> None:
    """Two responses at .2, one of them of the target, and two at .9, both: (2 * .3 + 2 * .1) / 4 = .2."""
    found = reliability(np.array([0.2, 0.2, 0.9, 0.9]), np.array([0, 1, 1, 1]))
    assert found.ece == pytest.approx(0.2)
    assert found.counts.tolist() == [2, 2]


def test_weights_of_both_responses_by_hand() -> None:
    """a = a_i = 1/2: a weight is 2p. p = .5 and .25: the mean of 1 and .5, and their product."""
    values = dict(zip(OF_SIDES, (0.5, 0.25), strict=True))
    assert weighing_of(Composition(sample_weight="dora_mean")).weight(values) == pytest.approx(0.75)
    assert weighing_of(Composition(sample_weight="dora_product")).weight(values) == pytest.approx(0.5)
    with pytest.raises(BadRowError, match="probability_rejected is not above 0"):
        DoraSidesWeight(0.5, 0.5, "mean").weight(values | {"probability_rejected": 0})


def write_rows(folder: Path, num: int = 60) -> Path:
    drawn = draw(2 * num, 0.5)
    rows = [
        {"prompt": "q", "chosen": drawn.texts[n], "rejected": drawn.texts[-1 - n], "c": "human", "r": "model"}
        for n in range(num)
    ]
    rows[0]["r"] = None  # type: ignore[assignment]  # of unknown source
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SOURCES = ("chosen_source=c", "rejected_source=r")


def test_rows_get_both_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside all that they had, in their order; and a picture."""
    path, out = write_rows(tmp_path), tmp_path / "weighed.jsonl"
    assert dispatch(["weigh", str(path), *SOURCES, "target=human", f"out={out}", "folds=2"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    weighed = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: row[key] for key in rows[0]} for row in weighed] == rows
    p = np.array([[row[name] for name in OF_SIDES] for row in weighed])
    assert p.min() > 0
    assert p.max() < 1
    assert p[:, 0].mean() > p[:, 1].mean()
    assert (tmp_path / "weighed.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "120 responses of 60 rows: 60 of human, 59 of others, 1 of unknown source; gamma 0.9833" in said


@pytest.mark.ci("fits once more")
def test_rows_that_are_lists_get_one_probability_a_response(tmp_path: Path) -> None:
    """Beside pairs, in the row's order; those of a row are in one fold. A source may be one for a list."""
    drawn = draw(180, 0.5)
    human, model = drawn.texts[:90], drawn.texts[90:]
    rows: list[dict[str, object]] = [
        {"prompt": "q", "responses": [human[n], model[n], model[n + 45]], "scores": [3, 2, 1]}
        | {"from": ["human", "model", "model"]}
        for n in range(40)
    ]
    rows += [
        {"prompt": "q", "responses": human[n : n + 2], "ranks": [1, 2], "from": "human"} for n in (80, 82)
    ]
    rows += [{"prompt": "q", "chosen": human[84], "rejected": human[85], "from": "human"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, words = tmp_path / "weighed.jsonl", ["source=from", "target=human", "folds=2"]
    assert dispatch(["weigh", str(tmp_path / "rows.jsonl"), *words, f"out={out}"]) == 0
    weighed = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: row[key] for key in old} for row, old in zip(weighed, rows, strict=True)] == rows
    p = [row["probabilities"] for row in weighed[:-1]]
    assert [len(of_row) for of_row in p] == [3] * 40 + [2, 2]
    assert np.mean([of_row[0] for of_row in p]) > np.mean([of_row[1] for of_row in p[:40]]) + 0.1
    assert set(weighed[-1]) - set(rows[-1]) == set(OF_SIDES)


@pytest.mark.ci("five short trainings")
def test_what_weigh_writes_is_what_a_training_weighs_by(tmp_path: Path) -> None:
    """Before the first update DPO's loss is log 2 of every pair, so that the first step of a batch of all
    pairs has mean(w) log 2, and with KL-DRO, inside whose exponent w stands, log mean e^(w log 2); outside
    it mean(w) log 2 again. With an exponent for each response the mean is over these."""
    records, held_out = arithmetic_records(60, 8, seed=0)
    for name, part in (("rows", records), ("held_out", held_out)):
        rows = []
        for number, record in enumerate(part):
            sides = {"chosen": record.chosen, "rejected": record.rejected}
            source = {"c": "human" if number % 3 else "model", "r": "model"}
            rows.append(json.dumps({"prompt": record.prompt, **sides, **source}) + "\n")
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    words = ["rows.jsonl", *SOURCES, "target=human", "out=weighed.jsonl", "folds=2"]
    assert rcpo("weigh", *words, cwd=tmp_path).returncode == 0
    weighed = [json.loads(line) for line in (tmp_path / "weighed.jsonl").read_text().splitlines()]
    cases = (("mean", "mean", "pair"), ("product", "mean", "pair"), ("mean", "kl_dro", "pair"))
    for how, aggregate, of in (*cases, ("mean", "kl_dro", "batch"), ("each", "kl_dro", "pair")):
        weighing = DoraSidesWeight(0.5, 0.5, how)
        each = np.array([weighing.weigh_sides(row).each for row in weighed])
        loss = (each if how == "each" else np.array([weighing.weight(row) for row in weighed])) * math.log(2)
        is_inside = aggregate == "kl_dro" and of == "pair"
        expected = math.log(np.exp(loss).mean()) if is_inside else loss.mean()
        folder = f"{how}-{aggregate}-{of}"
        made = rcpo(
            "train", "data=file", "data.path=weighed.jsonl", "data.eval_path=held_out.jsonl",
            "data.eval_pairs=8", f"objective.sample_weight=dora_{how}", f"objective.aggregate={aggregate}",
            "train.steps=2", "train.pairs_per_step=60", "train.pairs_per_device=20", "tracking=none",
            f"run_dir={folder}", f"objective.weight_of={of}", cwd=tmp_path,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        first, _ = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        assert json.loads(first)["train/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["target=human"], "out: is missing; type out=FILE.jsonl"),
        (["out=o.jsonl"], "target: is missing; type target=VALUE"),
        (["out=o.csv", "target=human"], "out=o.csv: must end in .jsonl; type out=o.jsonl"),
        (["out=o.jsonl", "target=x", "chosen_source=c"], "chosen_source and rejected_source: give both"),
        (["out=o.jsonl", "target=human"], "rows.jsonl: row 0 (counted from 0) has no source; type"),
        (["out=o.jsonl", "target=humn", *SOURCES], "target=humn: no response has this source; the closest"),
        (["out=o.jsonl", "target=human", "folds=40", *SOURCES], "60 rows are of the target, and 40 folds"),
        (["out=o.jsonl", "target=human", "calibration=plat"], "calibration=plat: did you mean platt?"),
        (["out=o.jsonl", "target=human", "encoder=/no/such", *SOURCES], "encoder=/no/such: cannot be loaded"),
    ],
)  # fmt: skip
def test_what_cannot_be_weighed_is_one_line(
    words: list[str], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        dispatch(["weigh", "rows.jsonl", *words])
    assert str(caught.value).startswith(fault)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "words", "fault"),
    [
        ({}, ["source=from"], "rows.jsonl: row 0 (counted from 0) has no from; type source=COLUMN"),
        ({"source": ["a"]}, [], "rows.jsonl: row 0 has 1 of source for 2 responses; mend it"),
        ({"source": "a"}, SOURCES, "rows.jsonl: row 0 is a list of responses; type source=COLUMN in place"),
        ({"source": "a", "responses": "x"}, [], "rows.jsonl: row 0: responses is str, not a list; mend it"),
        ({"source": "a", "responses": [1, 2]}, [], "rows.jsonl: row 0: a response is neither text nor"),
        ({"source": "a", "probabilities": [1, 1]}, [], "rows.jsonl: row 0 has probabilities already; weigh"),
    ],
)
def test_a_list_that_cannot_be_weighed_is_one_line(
    row: dict[str, object], words: list[str], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "responses": ["a", "b"], **row}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        dispatch(["weigh", "rows.jsonl", "out=o.jsonl", "target=a", *words])
    assert str(caught.value).startswith(fault)
