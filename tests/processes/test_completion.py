"""TAB completion in a real bash: the shell function runs as readline would call it, with the real `rcpo`."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rcpo import cli

ASK = """
eval "$(rcpo completion bash)"
complete -p rcpo >&2
for COMP_LINE in "$@"; do
    COMP_POINT=${#COMP_LINE}; read -ra COMP_WORDS <<< "$COMP_LINE"
    [[ "$COMP_LINE" == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMPREPLY=()
    _rcpo
    echo "${COMPREPLY[*]}"
done
"""
OFFERED = {
    "rcpo ": " ".join(cli.COMMANDS),
    "rcpo tr": "train ",
    "rcpo completion ": "bash",
    "rcpo train objective=s": "objective=sft objective=simpo objective=slic objective=sppo",
    "rcpo train tracking=": "tracking=none tracking=wandb",
    "rcpo train train.st": "train.steps=",
    "rcpo train objective=simpo objective.g": "objective.gamma=",
    "rcpo train objective=simpo calibration=on optim=a": "optim=adamw",
    "rcpo train hyd": "",
    "rcpo train --c": "--cfg --config-dir",
    "rcpo train --config-dir m": "mine",
    "rcpo train --config-dir mine objective=my": "objective=my_own",
    "rcpo train data=file data.path=pa": "data.path=pairs.jsonl",
    "rcpo resume mi": "mine",
    "rcpo compare mi": "mine",
    "rcpo compare mine --h": "--help --html",
    "rcpo compare mine --ches ": "auto yes no",
    "rcpo dashboard a/b --u": "--update",
    "rcpo watch --o": "--once",
    "rcpo bench --st": "--steps",
    "rcpo bench --baseline p": "plain",
    "rcpo bench --shape layers=2 objective=sp": "objective=sppo",
}
"""A line, and what TAB offers at its end."""


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Answers of one bash to all lines, in a folder with a config folder and a data file."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "mine/objective").mkdir(parents=True)
    (folder / "mine/objective/my_own.yaml").write_text("name: dpo\nbeta: 0.3\n")
    (folder / "pairs.jsonl").write_text("{}\n")
    path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n"
    done = subprocess.run(
        ["bash", "--norc", "-c", path + ASK, "bash", *OFFERED],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "complete -o default -o nospace -F _rcpo rcpo\n"
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "pairs.jsonl"]
    return dict(zip(OFFERED, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("line", OFFERED)
def test_tab_offers_what_can_come_next(offered: dict[str, str], line: str) -> None:
    assert offered[line] == OFFERED[line]
