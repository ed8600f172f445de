"""TAB completion in real shells, with the real `rcpo`. In bash the shell function runs as readline would call
it; zsh and fish are asked for a few lines, since all that differs is argcomplete's own code."""

import contextlib
import os
import pty
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rcpo import cli

ASK = """
eval "$(rcpo completion bash)"
complete -p rcpo >&2
for COMP_LINE in "$@"; do
    COMP_POINT=${#COMP_LINE}; COMPREPLY=()
    _python_argcomplete rcpo
    echo "${COMPREPLY[*]}"
done
"""
OFFERED = {
    "rcpo ": " ".join(cli.COMMANDS),
    "rcpo tr": "train ",
    "rcpo completion ": "bash zsh fish",
    "rcpo train objective=s": "sft simpo slic sppo",
    "rcpo train tracking=": "none tensorboard trackio wandb",
    "rcpo train train.st": "train.steps= train.stop_when=",
    "rcpo train metri": "metrics.answer_tokens= metrics.answers= metrics.geometry_every= metrics.population= "
    "metrics.vision_gain=",
    "rcpo train objective=simpo objective.g": "objective.gamma=",
    "rcpo train objective=simpo calibration=on optim=s": "sgd ",
    "rcpo train objective=simpo --overwrite calibration=e": "exact ",
    "rcpo train hyd": "",
    "rcpo train --c": "--config-dir --cfg",
    "rcpo train --cfg ": "job hydra all",
    "rcpo train --config-dir m": "mine/",
    "rcpo train --config-dir mine objective=my": "my_own ",
    "rcpo train data=file data.path=pa": "pairs.jsonl ",
    "rcpo train -m objective=dpo,si": "dpo,simpo ",
    "rcpo train -m objective=dpo,ipo 'seed=range(3)' optim=s": "sgd ",
    "rcpo train -m seed=1,2 --dry": "--dry-run ",
    "rcpo resume mi": "mine/",
    "rcpo compare mi": "mine/",
    "rcpo compare mine --h": "--help --html",
    "rcpo compare mine --ches ": "auto yes no",
    "rcpo compare mine --where objective=si": "simpo ",
    "rcpo generate mine prom": "prompts=",
    "rcpo generate mine format=a": "alpaca_eval arena_hard",
    "rcpo generate prompts=pa": "pairs.jsonl ",
    "rcpo evaluate mine initial=": "yes no",
    "rcpo dashboard a/b --u": "--update ",
    "rcpo watch --o": "--once ",
    "rcpo sweep pai": "pairs.jsonl ",
    "rcpo sweep pairs.jsonl --slurm exam": "example ",
    "rcpo bench --st": "--steps ",
    "rcpo bench --baseline p": "plain ",
    "rcpo bench --shape layers=2 objective=sp": "sppo ",
}
"""A line, and what TAB offers at its end; behind the last = where bash breaks words there."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a config folder and a data file, where this environment's `rcpo` comes first."""
    made = tmp_path_factory.mktemp("completion")
    (made / "mine/objective").mkdir(parents=True)
    (made / "mine/objective/my_own.yaml").write_text("name: dpo\nbeta: 0.3\n")
    (made / "pairs.jsonl").write_text("{}\n")
    return made


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def offered(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """Answers of one bash to all lines."""
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", *OFFERED],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "complete -o bashdefault -o default -o nospace -F _python_argcomplete rcpo\n"
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "pairs.jsonl"]
    return dict(zip(OFFERED, done.stdout.split("\n"), strict=False))


@pytest.mark.parametrize("line", OFFERED)
def test_tab_offers_what_can_come_next(offered: dict[str, str], line: str) -> None:
    assert offered[line].replace("\v", " ") == OFFERED[line]


FISH_OFFERED = {
    "rcpo tr": "train\ttrain a model on preference pairs",
    "rcpo compare mine --h": "--help\tshow this help message and exit\n"
    "--html\twrite the report: one file that needs no network",
    "rcpo train objective=si": "objective=simpo",
    "rcpo train data=file data.path=pa": "data.path=pairs.jsonl",
}


@pytest.mark.ci("shells", needs="fish")
@pytest.mark.parametrize("load", ['eval "$(rcpo completion fish)"', "rcpo completion fish | source"])
def test_fish_offers_the_same_with_its_meaning(folder: Path, environment: dict[str, str], load: str) -> None:
    asked = "; ".join(f"complete -C{shlex.quote(line)}; echo ==" for line in FISH_OFFERED)
    said = subprocess.run(
        ["fish", "--no-config", "-c", f"{load}; {asked}"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    answers = [answer.strip() for answer in said.stdout.split("==\n")]
    assert answers[:-1] == list(FISH_OFFERED.values()), said.stderr


@contextlib.contextmanager
def typed_in_zsh(folder: Path, environment: dict[str, str]) -> Iterator[Callable[[str, str], None]]:
    """A zsh on a terminal of its own; gives the function that types a text and waits for another."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execvpe("zsh", ["zsh", "-f", "-i"], environment | {"TERM": "dumb", "PS1": "> "})

    def type_and_see(text: str, wanted: str) -> None:
        os.write(terminal, text.encode())
        seen, end = "", time.monotonic() + 30
        while wanted not in seen:
            assert time.monotonic() < end, f"{wanted!r} is not in {seen!r}"
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 1 << 16).decode(errors="replace")

    try:
        yield type_and_see
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


@pytest.mark.ci("shells", needs="zsh")
def test_zsh_completes_a_command_a_group_and_a_key(folder: Path, environment: dict[str, str]) -> None:
    with typed_in_zsh(folder, environment) as type_and_see:
        type_and_see('autoload -Uz compinit; compinit -D -u; eval "$(rcpo completion zsh)"\n', "> ")
        type_and_see('echo re""ady\n', "ready")
        type_and_see("rcpo tr\t", "rcpo train ")
        type_and_see("objective=sim\t", "simpo ")
        type_and_see("train.ste\t", "train.steps=")
        type_and_see("3 calibration=\t", "feedback")
