"""`rcpo judge` of runs: against `off` or the initial model, by a judge of this machine that prefers longer
answers; what is kept, and what rcpo compare makes of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.compare_folders import compare, make_run
from helpers.loopback_judge import judging_by, longer
from rcpo import cli
from rcpo.comparison.table import make_lines
from rcpo.config.compose import compose as compose_config
from rcpo.config.resolve import resolve
from rcpo.config.validate import validate
from rcpo.evaluation import chat as chat_module
from rcpo.evaluation.results import Results
from rcpo.models.load import model_place
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree

WORDS = ["prompts=held_out", "limit=5", "max_new_tokens=12", "judge=loopback"]


def make_trained(folder: Path, calibration: str, seed: int, noise: float) -> Path:
    """A run that is done, whose model is the one that ships with noise on its weights."""
    path = folder / f"{calibration}-{seed}"
    words = [f"run_dir={path}", f"seed={seed}", f"calibration={calibration}", "data.eval_pairs=8"]
    tree = compose_config(["tracking=none", "objective=dpo", *words])
    assert tree is not None
    config = resolve(validate(tree), None)
    RunFolder(path).create(config, config_tree(config))
    numbers = make_run(folder.with_name("numbers") / path.name, "dpo", calibration, seed)
    for name in ("metrics.jsonl", "eval.jsonl"):
        shutil.copy(numbers / name, path / name)
    shutil.copytree(numbers / "eval", path / "eval", dirs_exist_ok=True)
    RunFolder(path).update_run(status="done")
    shutil.copytree(model_place("builtin:tiny"), path / "final")
    file = path / "final/model.safetensors"
    draw = torch.Generator().manual_seed(seed)
    weights = {
        name: value + noise * torch.randn(value.shape, generator=draw).to(value.dtype)
        for name, value in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    return path


def judge(*words: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["judge", *words])
    assert stop.value.code == code


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(chat_module, "RETRIES", 0)
    monkeypatch.setenv("RCPO_CACHE", str(tmp_path / "cache"))
    for seed in (0, 1):
        make_trained(tmp_path / "runs", "off", seed, noise=0.0)
        make_trained(tmp_path / "runs", "balance", seed, noise=0.2)
    return tmp_path / "runs"


def answers_of(run: Path) -> list[str]:
    (file,) = (run / "evaluation/answers").glob("*.jsonl")
    return [json.loads(line)["response"] for line in file.read_text().splitlines()]


def test_cells_are_judged_against_off_of_their_seed(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five prompts, of each run the first five of its held-out ones; the rate is the share of longer answers,
    equal ones half. Without --yes answers are generated and nothing is sent; nothing is asked twice."""
    with judging_by(longer) as (url, seen):
        words = [str(grid), "against=off", *WORDS, f"url={url}"]
        judge(*words, code=2)
        said = capsys.readouterr().err
        assert "20 requests to" in said
        assert "nothing was sent: type --yes" in said
        assert seen == []
        judge(*words, "--yes")
        assert len(seen) == 20
        judge(*words, "--yes")
        assert len(seen) == 20
    text = capsys.readouterr().out
    assert text.count("generating") == 0, "the first call has generated all"
    assert "as the column win_vs_off" in text
    rates = []
    for seed in (0, 1):
        own, other = (answers_of(grid / f"{name}-{seed}") for name in ("balance", "off"))
        expected = [0.5 + 0.5 * np.sign(len(one) - len(two)) for one, two in zip(own, other, strict=True)]
        result = Results(grid / f"balance-{seed}").of("final")["win_vs_off"]
        assert result.main[0] == "win rate against off, by loopback,"
        assert result.main[1].value == np.mean(expected)
        rates.append(result.main[1].value)
        assert Results(grid / f"off-{seed}").of("final")["win_vs_off"].main[1].value == 0.5
        kept = json.loads((grid / f"balance-{seed}/evaluation/judge/win_vs_off.json").read_text())
        assert kept["win_rate"]["value"] == rates[-1]
        assert kept["order"]["consistent"] == 1.0
    assert any(rate != 0.5 for rate in rates)
    (line,) = (line for line in make_lines(compare(grid)) if line.group.calibration == "balance")
    difference = line.group.differences["downstream/win_vs_off"]
    assert (difference.num_seeds, difference.num_pairs) == (2, 5)
    assert difference.mean == pytest.approx(np.mean(rates) - 0.5)


def test_cells_are_judged_against_what_they_started_from(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`off` is the initial model here: it ties with itself. The initial model answers once for all runs."""
    with judging_by(longer) as (url, _):
        judge(str(grid), "against=initial", *WORDS, f"url={url}", "column=mine", "--yes")
    assert len(list((grid.parent / "cache/answers").glob("*.jsonl"))) == 1
    for seed in (0, 1):
        assert Results(grid / f"off-{seed}").of("final")["mine"].main[1].value == 0.5
        assert set(Results(grid / f"balance-{seed}").of("final")) == {"mine"}
    assert capsys.readouterr().out.count("| initial model |") == 4
