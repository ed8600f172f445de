"""`rcpo doctor` on this machine as it is, and as it would be with something taken away."""

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from rcpo import cli
from rcpo.launch import doctor
from rcpo.launch.doctor import Finding, examine

WHATS = {
    "Python", "packages", "bitsandbytes", "liger-kernel", "flash_attn", "GPUs", "DeepSpeed", "DeepSpeed ops",
    "compiler", "SLURM", "W&B", "Hugging Face", "disk: runs", "disk: rcpo's cache", "disk: models",
    "/dev/shm", "memory", "cores",
}  # fmt: skip


@pytest.fixture(autouse=True)
def home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of the user's, and a working directory that holds nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", *words])
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().out


def test_readme_says_which_gpus_passed() -> None:
    """Each by its name, or that all ran on CPUs."""
    readme = (ROOT / "README.md").read_text()
    assert all(name in readme for name in doctor.PASSED_ON)
    assert ("All ran on CPUs" in readme) == (not doctor.PASSED_ON)


def found(what: str) -> Finding:
    (finding,) = (finding for finding in examine() if finding.what == what)
    return finding


def test_the_table_and_the_json_say_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """This machine trains (the other tests do), so nothing is missing; what is not ok says what to do."""
    code, output = command(capsys, "--json")
    answer: dict[str, Any] = json.loads(output)
    assert (code, answer["ok"]) == (0, True)
    assert {finding["what"] for finding in answer["findings"]} >= WHATS
    code, table = command(capsys)
    assert code == 0
    assert "\x1b" not in table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    for finding in answer["findings"]:
        assert finding["verdict"] in ("ok", "note")
        assert (finding["verdict"] == "ok") == (finding["advice"] == "")
        (cells,) = (cells for cells in rows if cells[1] == finding["what"])
        assert cells == [finding["verdict"], finding["what"], finding["seen"], finding["advice"]]
    assert table.rstrip().endswith("notes.")
    assert list(tmp_path.iterdir()) == [], "a doctor changes nothing"


def test_a_cache_that_cannot_be_written_is_missing_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file stands where the folder should be: so for root too."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RCPO_CACHE", str(tmp_path / "file/cache"))
    code, table = command(capsys)
    assert code == 1
    (line,) = (line for line in table.splitlines() if "disk: rcpo's cache" in line and line.startswith("|"))
    assert line.startswith("| missing")
    assert "file cannot be written" in line
    assert "set RCPO_CACHE" in line
    assert table.rstrip().endswith("Mend first: disk: rcpo's cache.")


def test_programs_that_are_not_there_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert found("compiler").verdict == found("SLURM").verdict == found("GPUs").verdict == "note"
    assert "login node" in found("SLURM").advice


def test_a_program_that_is_there_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that torch's CPU build cannot use; a SLURM client."""
    for name, said in (("sbatch", "slurm 99.1"), ("nvidia-smi", "580.1\n580.1")):
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '{said}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert found("SLURM") == Finding("SLURM", "ok", "slurm 99.1")
    assert "580.1" in found("GPUs").seen


def test_a_key_is_found_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    assert found("W&B").verdict == "ok"
    assert "f" * 40 not in str(examine())
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert found("W&B") == Finding("W&B", "note", "WANDB_MODE=offline", "unset WANDB_MODE to track online")


def test_packages_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if pyproject.toml asked for another torch, and for a package that nobody has."""
    asked = ["torch<1", "no-such-package>=2", "nothing>=1; extra == 'test'", "never; python_version < '3'"]
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    finding = found("packages")
    assert finding.verdict == "missing"
    assert finding.seen == f"torch {metadata.version('torch')} (needs <1), no no-such-package"


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def _broken_thing() -> list[Finding]:
        raise OSError("the disk\nis gone")

    monkeypatch.setattr(doctor, "CHECKS", (_broken_thing,))
    assert examine() == [Finding("broken thing", "missing", "OSError: the disk is gone", "mend this first")]
