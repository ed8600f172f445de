"""CHES in the report's tables of fallen pairs: the value of `rcpo score`, of the model that the run started
from, or the reason why there is none."""

import html
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from helpers.compare_folders import compare, make_run
from helpers.inputs import row
from rcpo import cli
from rcpo.comparison.statistics import spearman
from rcpo.comparison.table import make_lines
from rcpo.data.score_file import HELD_OUT, read_pair_scores
from rcpo.models.load import model_place
from rcpo.report import pair_ches
from rcpo.report.fallen import ChesChoice, find_fallen
from rcpo.report.page import make_page, same_decimals

ANSWERS = [("six", "two"), ("seven", "eight"), ("two", "six"), ("nine", "ten"), ("Paris", "London"),
           ("five", "five four"), ("three", "one")]  # fmt: skip
"""The fifth is identical once tokenised, and so held out by no run."""
FALLS = [1.0, -2.0, -6.0, -3.0, -4.0, 0.5]
"""Of the other six."""


class Case(NamedTuple):
    """A run of the embedded model, copied to `model`, and what `rcpo score` says of its held-out pairs."""

    runs: Path
    model: Path
    scores: dict[str, list[Any]]

    def page(self, choice: ChesChoice = "auto") -> str:
        """The page, without the minute in which it was made."""
        comparison = compare(self.runs)
        made = html.unescape(make_page(make_lines(comparison), comparison, choice))
        return re.sub(r"\d\d:\d\d UTC", "UTC", made)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("ches")
    shutil.copytree(model_place("builtin:tiny"), folder / "model")
    held_out = [row("alice", *answers) for answers in ANSWERS]
    for name, rows in (("train", [row("bob", "seven", "eight")] * 2), ("held-out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    settings = {
        "model.path": str(folder / "model"), "model.dtype": "float32", "data.source": "file",
        "data.path": str(folder / "train.jsonl"), "data.eval_path": str(folder / "held-out.jsonl"),
        "data.eval_pairs": 10, "data.on_bad_row": "drop",
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in settings.items() if key != "data.source"]
    words += ["data=file", "train.device=cpu", "--out", str(folder / "scores.parquet")]
    assert cli.dispatch(["score", *words]) == 0
    scores = read_pair_scores(str(folder / "scores.parquet"), "x").of_split(HELD_OUT)
    start = torch.tensor([scores["z_w"], scores["z_l"]])
    make_run(folder / "runs" / "off", settings=settings, start=start, change=(FALLS, [-1.0] * 6))
    return Case(folder / "runs", folder / "model", scores)


@pytest.fixture
def case(made: Case, tmp_path: Path) -> Case:
    """A copy to spoil; its run names its own model."""
    shutil.copytree(made.runs, tmp_path / "runs")
    shutil.copytree(made.model, tmp_path / "model")
    config = tmp_path / "runs/off/config.yaml"
    config.write_text(config.read_text().replace(str(made.model), str(tmp_path / "model")))
    return made._replace(runs=tmp_path / "runs", model=tmp_path / "model")


def test_the_page_has_the_ches_that_rcpo_score_gives_the_same_pairs(made: Case) -> None:
    """Held-out rows 0 to 3, 5 and 6; those that fell, deepest first: the third, fifth, fourth and second."""
    page = made.page()
    body = page.split("whose chosen response fell most under off")[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", part, re.S) for part in body.split("</tr>")[:-1]]
    places = [2, 4, 3, 1]
    assert [cells[0] for cells in rows] == list(map(str, places))
    assert made.scores["row"] == [0, 1, 2, 3, 5, 6]
    per_token = made.scores["ches_norm"]
    for column, name in ((2, "ches"), (3, "ches_norm")):
        assert [cells[column] for cells in rows] == same_decimals([made.scores[name][idx] for idx in places])
    lower = [sum(value < per_token[idx] for value in per_token) for idx in places]
    assert [cells[4] for cells in rows] == [f"{100 * num / 6:.0f}" for num in lower]
    assert rows[1][6:8] == ["five", "five four"]
    falls = torch.tensor(FALLS, dtype=torch.float64).numpy()
    assert f"{spearman(torch.tensor(per_token).numpy(), falls):+.2f}, where -1" in page


def test_a_column_has_the_decimals_of_its_largest_number() -> None:
    assert same_decimals([0.626, -10.84, 1.9]) == ["0.6", "-10.8", "1.9"]
    assert same_decimals([0.0128, -0.2211]) == ["0.013", "-0.221"]
    assert same_decimals([123456.7, 3.2]) == ["123457", "3"]
    assert same_decimals([0.0]) == ["0"]


def test_unrounded_it_is_the_same_too(made: Case) -> None:
    groups = compare(made.runs).groups
    (fallen,) = find_fallen({"dpo": groups}, "auto").values()
    for pair in fallen.pairs:
        assert pair.ches is not None
        assert pair.ches.ches == pytest.approx(made.scores["ches"][pair.index], rel=1e-5, abs=1e-4)
        assert pair.ches.per_token == pytest.approx(made.scores["ches_norm"][pair.index], rel=1e-5, abs=1e-4)


def test_rank_correlation_of_known_ranks() -> None:
    """Ranks 1 2.5 2.5 4 and 4 3 2 1: 0.5 * sum d^2 = (9 + .25 + .25 + 9) / 2; by the product moment
    -4.5 / sqrt(4.5 * 5)."""
    left, right = torch.tensor([1.0, 5.0, 5.0, 9.0]).numpy(), torch.tensor([8.0, 6.0, 4.0, 2.0]).numpy()
    assert spearman(left, right) == pytest.approx(-4.5 / (4.5 * 5) ** 0.5)
    assert spearman(left, left) == pytest.approx(1)
    assert spearman(left, 0 * left) != spearman(left, 0 * left)


def larger(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_ches, "MAX_BYTES", 1e6)


def slower(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_ches, "MAX_WORK", 1e6)


def removed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the pair that takes a tokenizer to tell."""
    shutil.rmtree(case.model)
    config = case.runs / "off/config.yaml"
    tree = yaml.safe_load(config.read_text())
    lines = Path(tree["data"]["eval_path"]).read_text().splitlines(keepends=True)
    tree["data"]["eval_path"] = str(case.runs / "held-out.jsonl")
    (case.runs / "held-out.jsonl").write_text("".join(lines[:4] + lines[5:]))
    config.write_text(yaml.safe_dump(tree))


def truncated(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = case.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def trained_since(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(case.model / "model.safetensors")
    name = "model.norm.weight"
    save_file(weights | {name: 2 * weights[name]}, case.model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "said", "can_be_asked"),
    [
        (larger, "the weights of {model} are 0.0 GB; type --ches yes", True),
        (slower, "it takes about 0 minutes of a processor core; type --ches yes", True),
        (removed, "{model} is not in a folder of this machine; type --ches yes", False),
        (truncated, "model.path={model}: the model cannot be loaded: ", False),
        (trained_since, "{model} is not what the run began with: these pairs have a mean log-prob", False),
    ],
)
def test_where_there_is_no_ches_its_column_says_why(
    case: Case, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., None], said: str, can_be_asked: bool
) -> None:
    spoil(case, monkeypatch)
    page = case.page()
    reason = page.split('rowspan="4">none: ')[1].split("</td>")[0]
    assert reason.startswith(said.format(model=case.model))
    assert "Spearman" not in page
    assert ("Spearman" in case.page("yes")) == can_be_asked


def test_no_ches_when_it_is_not_wanted(case: Case) -> None:
    page = case.page("no")
    assert "CHES" not in page
    assert "five four" in page


def test_without_its_tokenizer_no_pair_gets_the_words_of_another(case: Case) -> None:
    """Seven pairs in the data, six measured."""
    shutil.rmtree(case.model)
    page = case.page()
    assert f"takes the tokenizer, and {case.model} is not in a folder" in page
    assert "five four" not in page
    assert "<td>4</td>" in page


def test_where_scoring_all_is_not_cheap_the_ten_alone_are_scored(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_ches, "CHEAP_WORK", 0)
    groups = compare(case.runs).groups
    (fallen,) = find_fallen({"dpo": groups}, "auto").values()
    assert [pair.ches.ches for pair in fallen.pairs if pair.ches] == pytest.approx(
        [case.scores["ches"][idx] for idx in (2, 4, 3, 1)], rel=1e-4
    )
    assert fallen.correlation is None
    assert "<th>percentile</th>" not in case.page()


def test_scores_are_kept_and_read_again_while_the_model_is_the_same(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of the file are shown while they hold, and scored anew when a file of the model changes."""
    monkeypatch.setattr(pair_ches, "KEPT_SECONDS", 0.0)
    cache = case.runs / "off/ches.json"
    first = case.page()
    content = json.loads(cache.read_text())
    assert len(content["pairs"]) == 6
    for values in content["pairs"].values():
        values[0] = 12345.0
    cache.write_text(json.dumps(content))
    assert case.page().count("<td>12345</td>") == 4
    os.utime(case.model / "config.json", ns=(0, 5))
    assert case.page() == first
    cache.write_text('{"source": 1')
    assert case.page() == first
    assert not list(case.runs.glob("off/.ches*"))
