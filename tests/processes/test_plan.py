"""`rcpo train --plan`, `--cfg job --resolve`: what a run would do and who decided it; nothing is written."""

from pathlib import Path

import pytest
import yaml

from rcpo.cli import dispatch

WORDS = ["data.train_pairs=64", "data.eval_pairs=8", "train.device=cpu", "optim.lr=0.01", "tracking=none"]


def test_a_plan_says_who_decides_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of three passes over 64 pairs, 16 a step: 12. The experiment wins over its groups' options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RCPO_CACHE", str(tmp_path / "cache"))
    conf = tmp_path.with_name(f"{tmp_path.name}-conf")
    (conf / "experiment").mkdir(parents=True)
    (conf / "experiment/mine.yaml").write_text("# @package _global_\ntrain: {epochs: 3, eval_every: 5}\n")
    words = [*WORDS, "train.pairs_per_device=4", "--config-dir", str(conf), "experiment=mine"]
    assert dispatch(["train", *words, "--plan"]) == 0
    lines = {line[:24].strip(): line[24:].strip() for line in capsys.readouterr().out.splitlines()}
    found = {what: tuple(part.strip() for part in text.split("  ") if part) for what, text in lines.items()}
    assert found["train.steps"] == ("12 (3 passes over the pairs)", "experiment=mine")
    assert found["train.eval_every"] == ("5", "experiment=mine")
    assert found["optim.lr"] == ("0.01", "typed")
    assert found["train.pairs_per_device"] == ("4, accumulated 4 times", "typed")
    assert found["train.pairs_per_step"] == ("16", "conf/config.yaml")
    assert found["deepspeed.stage"] == ("1", "rcpo: 1 on CPUs")
    assert found["reference"] == ("the initial policy: 72 pairs, once", "reference=cached")
    assert found["tracking"][0] == "none"
    assert found["memory of a rank"][1].startswith("weights 1.37 MB, gradients 1.37 MB, optimizer 4.1 MB")
    assert list(tmp_path.iterdir()) == []


def test_the_resolved_config_marks_what_rcpo_decides(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["train", *WORDS, "--cfg", "job", "--resolve", "--package", "train"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "# @package train"
    assert "steps: 150  # by rcpo" in lines
    assert "pairs_per_step: 16" in lines
    assert "max_prompt_length: null" in lines
    assert yaml.safe_load("\n".join(lines))["device"] == "cpu"
