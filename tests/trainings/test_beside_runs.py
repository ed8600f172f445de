"""Trainings whose likelihood term is of a text beside the responses: the prompt's too, or a gold response."""

import json
from pathlib import Path

import pytest

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import train_all
from helpers.same_run import metrics
from rcpo.runs.folder import RunFolder

pytestmark = pytest.mark.ci("four trainings of 6 steps")
SFT = Case("cpo", "on", "llama-tied", "sgd")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], RunFolder]:
    """By objective.sft_of and pairs a micro-batch."""
    inputs, folder = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("runs")
    write_inputs(inputs)
    words = []
    for key, num, first in (("data.path", 20, 3), ("data.eval_path", 6, 23)):
        rows = [
            {
                "prompt": f"w{first + number % 13} w{4 + number}", "chosen": " w5 w6", "rejected": " w7",
                "gold": f" w8 w{9 + number % 5} w3",
            }
            for number in range(num)
        ]  # fmt: skip
        file = Path(inputs) / f"{key}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words.append(f"{key}={file}")
    runs = {}
    for of in ("text", "gold"):
        for size in (8, 2):
            name, layout = folder / f"{of}-{size}", Layout(1, size)
            config = make_config(inputs, name, SFT, layout, *words, f"objective.sft_of={of}")
            runs[of, size] = make_run(config)
    train_all(list(runs.values()), 1, 300)
    return runs


@pytest.mark.parametrize("of", ["text", "gold"])
def test_a_run_begins_and_does_not_depend_on_its_micro_batches(
    trained: dict[tuple[str, int], RunFolder], of: str
) -> None:
    for mine, row in zip(metrics(trained[of, 2]), metrics(trained[of, 8]), strict=True):
        for key in ("train/loss", "displacement/chosen", "train/grad_norm"):
            assert mine[key] == pytest.approx(row[key], rel=1e-4, abs=1e-5)


def test_the_gold_response_rises_and_is_shown(trained: dict[tuple[str, int], RunFolder]) -> None:
    rows = trained["gold", 8].rows(trained["gold", 8].eval)
    assert rows[0]["displacement/gold"] == 0
    assert rows[-1]["displacement/gold"] > 0.1
    assert rows[-1]["displacement/gold"] == pytest.approx(rows[-1]["logps/gold"] - rows[0]["logps/gold"])
    other = trained["text", 8]
    assert not any("displacement/gold" in row for row in other.rows(other.eval))
