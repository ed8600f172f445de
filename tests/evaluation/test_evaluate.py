"""`rcpo evaluate`: the word problems, what is kept of a task, what is not asked again, and columns of
compare."""

import csv
import importlib.util
import io
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from helpers.compare_folders import compare, make_run
from helpers.lm_eval_tasks import write_task
from rcpo import cli
from rcpo.common.errors import UserError
from rcpo.comparison.forms import as_csv, as_markdown
from rcpo.comparison.table import make_lines
from rcpo.comparison.view import make_view
from rcpo.config.compose import compose as compose_config
from rcpo.config.resolve import resolve
from rcpo.config.validate import validate
from rcpo.evaluation import arithmetic
from rcpo.evaluation.arithmetic import kind_of
from rcpo.evaluation.harness import Harness
from rcpo.evaluation.results import INITIAL, Results, Score, TaskResult, score_of
from rcpo.evaluation.subject import Loaded, find_subject
from rcpo.models.load import model_place
from rcpo.records.arithmetic import Problem, problem_split
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree

PROBLEM = Problem("alice", "apples", "gets", 3, 4)


def make_done(path: Path, *words: str) -> Path:
    """A run that ended where it began: final/ is the model that ships."""
    tree = compose_config([f"run_dir={path}", "tracking=none", "data.eval_pairs=8", *words])
    assert tree is not None
    config = resolve(validate(tree), None)
    RunFolder(path).create(config, config_tree(config))
    shutil.copytree(model_place("builtin:tiny"), path / "final")
    return path


def evaluate(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", *words])
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("alice has seven apples now .", "exact_match"),
        ("alice has six apples now .", "near_miss"),
        ("alice has nine apples now .", "near_miss"),
        ("alice has four apples now .", "other"),
        ("bob has seven apples now .", "other"),
        ("alice has seven apples now . now .", "other"),
        ("", "other"),
    ],
)
def test_an_answer_is_right_word_for_word(answer: str, kind: str) -> None:
    """Three and four are seven; what is one or two off is a near miss, as rejected responses are."""
    assert kind_of(PROBLEM, answer) == kind


def test_a_score_is_a_mean_with_its_standard_error() -> None:
    """Of 1, 0, 1, 1: mean 3/4, variance (3/16 + 9/16) / 3 = 1/4, error sqrt(1/4 / 4) = 1/4."""
    assert score_of([1.0, 0.0, 1.0, 1.0]) == Score(0.75, 0.25)
    assert score_of([1.0]) == Score(1.0, None)


def test_a_run_and_what_it_started_from_are_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The problems are the run's own held-out ones; the scores are what its kept answers say."""
    run = make_done(tmp_path / "run")
    evaluate(str(run))
    assert "initial model" in capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    assert set(found) == {INITIAL, "final"}
    scores = found["final"]["arithmetic"]["metrics"]
    table = pd.read_parquet(run / "evaluation/final/arithmetic.parquet")
    assert list(table["id"]) == [problem.prompt() for problem in problem_split(0, 8, 0)[1]]
    assert (
        scores["exact_match"]["value"]
        == (table["answer"] == table["expected"]).mean()
        == table["value"].mean()
    )
    assert sum(score["value"] for score in scores.values()) == pytest.approx(1.0)
    assert found[INITIAL]["arithmetic"]["metrics"] == scores


def test_what_is_known_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By content: two runs whose weights are still the initial model's are asked once, and nothing the second
    time, though a file was written again; weights that have changed are asked again."""
    asked: list[str] = []

    def ask(loaded: Loaded, batch: int) -> Any:
        asked.append(f"{loaded.subject.name} {loaded.subject.when}")
        return {"exact_match": Score(0.5, None)}, [{"id": "a", "value": 0.5}]

    monkeypatch.setattr(arithmetic, "ask", ask)
    runs = [str(make_done(tmp_path / name, f"name={name}")) for name in ("a", "b")]
    evaluate(*runs)
    assert asked == ["a step-000000"]
    assert set(Results(Path(runs[1])).of(INITIAL)) == {"arithmetic"}
    evaluate(*runs)
    weights = tmp_path / "a/final/model.safetensors"
    weights.write_bytes(weights.read_bytes())
    evaluate(*runs)
    assert len(asked) == 1
    weights.write_bytes(weights.read_bytes() + b"others")
    evaluate(*runs)
    assert asked[1:] == ["a final"]
    evaluate(runs[1], "initial=no", "--again")
    assert asked[2:] == ["b final"]


def add_scores(run: Path, values: Sequence[float], initial: float | None = 0.5) -> None:
    rows = [{"id": f"q{number}", "value": value} for number, value in enumerate(values)]
    results = Results(run)
    results.add("final", "sums", TaskResult({"acc": score_of(values)}, len(values), {}), rows)
    if initial is not None:
        results.add(INITIAL, "sums", TaskResult({"acc": Score(initial, 0.1)}, len(values), {}), rows)


def test_compare_has_a_column_with_its_difference_to_off(tmp_path: Path) -> None:
    """Two seeds and four questions, of which off answers 1, 2 and on 3, 4: means 3/8 and 7/8. Over seeds the
    questions' differences are 0, 1/2, 1, 1/2: variance 1/6, error sqrt(1/24). A run without scores has a
    dash."""
    for seed, off, on in ((0, (1, 0, 0, 0), (1, 1, 1, 0)), (1, (1, 1, 0, 0), (1, 1, 1, 1))):
        add_scores(make_run(tmp_path / f"off-{seed}", "dpo", "off", seed), off)
        add_scores(make_run(tmp_path / f"on-{seed}", "dpo", "on", seed), on)
    make_run(tmp_path / "other", "simpo", "off", 0)
    comparison = compare(tmp_path)
    lines = make_lines(comparison)
    view = make_view(lines, comparison)
    rows = {
        (row["objective"], row["calibration"]): row
        for row in csv.DictReader(io.StringIO(as_csv(lines, comparison, view)))
    }
    on = rows["dpo", "on"]
    assert (float(rows["dpo", "off"]["downstream/sums"]), float(on["downstream/sums"])) == (0.375, 0.875)
    assert float(on["vs_off_downstream/sums"]) == 0.5
    assert rows["simpo", "off"]["downstream/sums"] == ""
    difference = next(line.group for line in lines if line.group.calibration == "on").differences[
        "downstream/sums"
    ]
    assert (difference.num_seeds, difference.num_pairs) == (2, 4)
    assert difference.se_pairs == pytest.approx(math.sqrt(1 / 24))
    text = as_markdown(lines, comparison)
    assert "sums vs off" in text
    assert "0.875 ± 0.125" in text
    assert "downstream/sums: acc at the end; before training 0.500." in text


def test_without_scores_the_table_is_as_it_was(tmp_path: Path) -> None:
    make_run(tmp_path / "off", "dpo", "off")
    comparison = compare(tmp_path)
    assert "downstream" not in as_markdown(make_lines(comparison), comparison)


def test_damaged_scores_are_told_of_their_run(tmp_path: Path) -> None:
    (make_run(tmp_path / "off", "dpo", "off") / "evaluation.json").write_text("{")
    make_run(tmp_path / "on", "dpo", "on")
    (left_out,) = compare(tmp_path).left_out
    assert "evaluation.json: is damaged" in left_out.reason


def test_an_adapters_run_is_read_with_its_base(tmp_path: Path) -> None:
    """B A of hand-set numbers changes the weights by them: W + 2 B A, with alpha = 2 rank."""
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_place("builtin:tiny"))
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    own = peft.get_peft_model(base, peft.LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj"]))
    for name, parameter in own.named_parameters():
        if "lora_" in name:
            torch.nn.init.constant_(parameter, 0.5)
    run = make_done(tmp_path / "run", "model.lora.rank=1", "model.lora.save=adapter")
    shutil.rmtree(run / "final")
    own.save_pretrained(run / "final")
    for word in (str(run), str(run / "final")):
        after = find_subject(word).load().model.layers[0].self_attn.q_proj.weight
        torch.testing.assert_close(after, before + 2 * 0.25 * torch.ones_like(before))


def test_without_lm_eval_its_tasks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else original(name)
    )
    with pytest.raises(UserError, match=r"^tasks=mmlu: needs lm-eval; type pip install 'rcpo\[evaluate\]'"):
        Harness(["mmlu"], None, None, False)


@pytest.mark.ci("lm-eval", needs="lm_eval")
def test_lm_evals_own_code_asks_a_task_of_ones_own(tmp_path: Path) -> None:
    """A local task file through lm-eval; its accuracy is what plain log-probabilities of the choices say. A
    name that is nearly right is told the right one."""
    rows = write_task(tmp_path / "tasks")
    run = make_done(tmp_path / "run")
    evaluate(str(run), "tasks=sums,arithmetic", f"tasks_dir={tmp_path / 'tasks'}", "initial=no", "batch=5")
    result = Results(run).of("final")["sums"]
    loaded = Loaded(find_subject(str(run)))

    def z(prompt: str, response: str) -> float:
        ids = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response)]
        with torch.no_grad():
            logps = loaded.model(torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1)
        return sum(float(logps[len(ids[0]) - 1 + place, token]) for place, token in enumerate(ids[1]))

    right = [
        max(range(3), key=[z(row["question"], each) for each in row["choices"]].__getitem__) == 0
        for row in rows
    ]
    assert result.metrics["acc"].value == pytest.approx(sum(right) / len(right))
    assert result.num_questions == 12
    table = pd.read_parquet(run / "evaluation/final/sums.parquet")
    assert list(table["value"]) == [float(each) for each in right]
    with pytest.raises(UserError, match=r"^tasks=sms: no such task; did you mean sums"):
        Harness(["sms"], tmp_path / "tasks", None, False)
