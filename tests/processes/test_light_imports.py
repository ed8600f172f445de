"""What a login node is asked for: commands that only look load no torch, and say what they cost."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import rcpo
from helpers.compare_folders import make_run
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.launch.first_look import look
from rcpo.sweep.folder import Cell, SweepFolder

HEAVY = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "hydra",
    "pydantic",
    "pandas",
    "plotly",
    "matplotlib",
)
RUN = f"""
import json, os, resource, sys
from rcpo.cli import main
code = 0
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = [name for name in {HEAVY} if name in sys.modules]
facts = {{"code": code, "heavy": heavy, "num": len(sys.modules), "cpu": used.ru_utime + used.ru_stime}}
os.write(2, (json.dumps(facts) + "\\n").encode())
"""


def facts_of(*words: str | Path) -> dict[str, Any]:
    """Exit code, heavy modules, number of modules and CPU seconds of a command line in a process of its
    own."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, words)], capture_output=True, text=True, timeout=120, check=True
    )
    facts: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])
    print(words[0], facts)
    return facts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for calibration in ("off", "on"):
        make_run(folder / calibration, "dpo", calibration)
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = SweepFolder(tmp_path_factory.mktemp("sweep"))
    cell = Cell("a", {"objective": "dpo"}, ["objective=dpo"], "digest")
    run = folder.run(cell)
    run.path.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump({"train": {"steps": 10, "epochs": None}}))
    run.run_json.write_text(json.dumps({"status": "done"}))
    folder.manifest.write_text(cell.line())
    folder.sweep_yaml.write_text("{}")
    return folder.path


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("status", "--help"), ("compare", "--help")])
def test_help_loads_next_to_nothing(words: tuple[str, ...]) -> None:
    """0.04 s of CPU where it was written; 0.3 s is the limit that users are promised."""
    facts = facts_of(*words)
    assert (facts["code"], facts["heavy"]) == (0, [])
    assert facts["num"] < 250


def test_status_loads_no_torch(sweep: Path) -> None:
    """Promised: 0.6 s of CPU."""
    facts = facts_of("status", sweep)
    assert (facts["code"], facts["heavy"]) == (0, [])


def test_status_of_a_sweep_on_slurm_loads_no_torch(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a squeue that knows of no job."""
    submitted = shutil.copytree(sweep, tmp_path / "sweep")
    SweepFolder(submitted).slurm.write_text(json.dumps({"submissions": []}))
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts = facts_of("status", submitted)
    assert (facts["code"], facts["heavy"]) == (0, [])


def test_a_tab_loads_next_to_nothing() -> None:
    """The parsers of all commands, and what asks them; Hydra comes with the first word of a config."""
    command = (
        "import sys, rcpo.commands.completion; from rcpo.commands import COMMANDS, parser; "
        "all(map(parser.whole_parser, COMMANDS)); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_compare_loads_no_torch_for_runs_that_it_knows(runs: Path) -> None:
    assert facts_of("compare", runs)["code"] == 0
    facts = facts_of("compare", runs)
    assert facts["code"] == 0
    assert not {"torch", "transformers", "deepspeed"} & set(facts["heavy"])


@pytest.mark.parametrize("words", [["optim.lr=fast"], ["data=file", "data.path=gone.jsonl"]], ids=" ".join)
def test_a_refused_word_loads_no_torch(words: list[str]) -> None:
    """0.4 to 0.5 s of CPU where it was written, where torch alone takes 4."""
    facts = facts_of("train", *words)
    assert facts["code"] == 2
    assert not {"torch", "transformers", "deepspeed", "datasets"} & set(facts["heavy"])


def test_a_folder_without_data_is_refused_without_torch(tmp_path: Path) -> None:
    facts = facts_of("train", "data=file", f"data.path={tmp_path}")
    assert facts["code"] == 2
    assert not {"torch", "transformers", "deepspeed", "datasets"} & set(facts["heavy"])


@pytest.mark.ci("more words refused at once")
@pytest.mark.parametrize(
    "line",
    [
        "train -m objective=dpo,simpo train.step=3",
        "sweep demo objectiv=dpo",
        "sweep demo model.path=./gone",
        "sweep demo train.steps=x --dry-run",
        "score model.path=./gone",
        "data model.path=./gone",
        "bench objectiv=dpo",
        "generate ./gone prompts=p.jsonl out=o.jsonl",
        "evaluate ./gone",
        "lab tokens ./gone",
        "lab persona ./gone",
        "lab refusal ./gone prompts=p.jsonl",
        "lab refusal builtin:tiny prompts=gone.jsonl",
        "lab persona model.path=./gone",
        "lab persona calibrations=off,balanced",
        "export ./gone out",
        "resume RUN train.step=3",
    ],
)
def test_a_refused_word_of_any_command_loads_no_torch(line: str, sweep: Path) -> None:
    """0.1 to 0.9 s of CPU where it was written, 3 to 8 with torch."""
    facts = facts_of(*line.replace("RUN", str(sweep / "cells" / "a")).split())
    assert facts["code"] == 2
    assert not {"torch", "transformers", "deepspeed", "datasets"} & set(facts["heavy"])


def test_a_hub_that_is_not_there_is_found_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.3 s of CPU where it was written, 9 with torch and transformers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    facts = facts_of("train", "model.path=org/name", f"run_dir={tmp_path / 'run'}")
    assert facts["code"] == 2
    assert not {"torch", "transformers", "deepspeed", "datasets"} & set(facts["heavy"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("optim.lr=fast", "optim.lr=fast: must be "),
        ("name=a/b", "name='a/b': must be 1 to 100 letters"),
        ("run_dir=there", "/there: exists and is not empty; choose another name"),
        ("model.path=./gone", "model.path=./gone: no such folder; give a model folder"),
        ("model.path=there", "/there: has no config.json"),
        ("data=file data.path=gone.jsonl", "data.path=gone.jsonl: no such file or folder"),
        ("data=file data.path='there/*.csv'", "/there/*.csv: matches no file"),
        ("data=file data.path=there/a.jsonl data.eval_path=no.csv", "data.eval_path=no.csv: no such file"),
    ],
)
def test_a_first_look_finds_what_a_second_would(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a.jsonl").write_text("{}")
    tree = compose(shlex.split(words))
    assert tree is not None
    with pytest.raises(UserError) as caught:
        look(tree, overwrite=False)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_first_look_lets_what_may_be_right_pass(tmp_path: Path) -> None:
    """Hub ids; an old run that is to be overwritten; builtin:tiny."""
    for words in (
        ["data=file", "data.path=org/pairs", "model.path=org/name", "optim.lr=1e-6"],
        [f"run_dir={tmp_path.parent}"],
    ):
        tree = compose(words)
        assert tree is not None
        look(tree, overwrite=True)


def test_importing_rcpo_loads_no_torch() -> None:
    command = "import rcpo, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
    assert set(rcpo.__all__) <= set(dir(rcpo))
