"""The command line: what help teaches, and what every mistake says. Bad input is one line on standard error
and exit code 2, and leaves nothing behind.

Mistakes go through `cli.main` in one process of their own, in a folder full of bad files: importing takes
seconds. A few commands run as users type them. Mistakes in keys and values are in `test_config.py`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rcpo
from helpers import forked
from rcpo import cli
from rcpo.commands.parser import command_parser
from rcpo.common.errors import UserError
from rcpo.config.resolve import _launch
from rcpo.config.schema import LaunchConfig
from rcpo.config.validate import validate
from rcpo.models.load import model_place
from rcpo.objectives import REGISTRY
from rcpo.objectives.composition import composition_defaults

RUN_ALL = """
import contextlib, io, json, sys, traceback
from helpers import forked
from rcpo import cli
answers = {}
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(line.split())
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = traceback.format_exc()
    answers[line] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(answers))
"""

ENTRIES = ("a-file", "bad.jsonl", "columns.jsonl", "empty.jsonl", "good.jsonl", "list.json", "mine",
           "no-config", "no-weights", "pickled", "roles.jsonl", "taken")  # fmt: skip
"""What `messy_folder` makes."""

MISTAKES = {
    "traine": "traine: no such command; choose one of " + ", ".join(cli.COMMANDS),
    "train data=file data.path=missing.jsonl": "data.path=missing.jsonl: no such file or folder; give a ",
    "train data=file data.path=empty.jsonl": "data.path={folder}/empty.jsonl: is empty; ",
    "train data=file data.path=bad.jsonl": "data.path={folder}/bad.jsonl: line 1 is not JSON (",
    "train data=file data.path=list.json": "data.path={folder}/list.json: ",
    "train data=file data.path=columns.jsonl": "data.path={folder}/columns.jsonl: has no column chosen "
    "and no column rejected, but a, b; type data.columns=",
    "train data=file data.path=roles.jsonl": "data.path={folder}/roles.jsonl: none of its 1 rows can train "
    "(prompt has the role 'robot'; ",
    "train data=file data.path=roles.jsonl data.on_bad_row=error": "data.path={folder}/roles.jsonl: row 0 "
    "(counted from 0) cannot train: prompt has the role 'robot'; ",
    "train data=file data.path=good.jsonl data.eval_pairs=8 train.pairs_per_step=64": "train.pairs_per_step="
    "64: there are only 32 training pairs; type train.pairs_per_step=32 or less",
    "train model=hf": "model.path: has no value and needs one; type model.path=...",
    "train model.path=nowhere": "model.path=nowhere: no such folder; ",
    "train model.path=a-file": "model.path={folder}/a-file: is a file; ",
    "train model.path=no-weights": "model.path={folder}/no-weights: has no *.safetensors weights; ",
    "train model.path=no-config": "model.path={folder}/no-config: has no config.json",
    "train model.path=pickled": "model.path={folder}/pickled: has no *.safetensors weights, only "
    "pickled ones; convert them, or type model.allow_pickle=true ",
    "train model.chat_template=none.jinja": "model.chat_template=none.jinja: no such file; ",
    "train train.pairs_per_device=3": "train.pairs_per_device=3: must divide the 16 pairs ",
    "train launch.processes=3": "train.pairs_per_step=16: must be a multiple of the 3 ranks; "
    "type train.pairs_per_step=18",
    "train train.device=cpu launch.gpus_per_node=2": "launch.gpus_per_node=2: no CUDA device is used here; "
    "type launch.processes=2",
    "train run_dir=taken": "run_dir={folder}/taken: exists and is not empty; ",
    "train run_dir=a-file/run": "run_dir={folder}/a-file/run: cannot be made (",
    "train run_dir=/proc/run": "run_dir=/proc/run: cannot be made (",
    "train --config-dir nowhere": "--config-dir {folder}/nowhere: no such folder; give one that is there\n",
    "train --config-dir mine objective=theirs": "objective.betta=1: dpo has no such parameter; "
    "did you mean objective.beta?",
    "train objective=dpo,simpo": "objective=dpo,simpo: is several values, and this is one run; ",
    "train calibration=on calibration.ema_beta=1": "calibration.ema_beta=1: must be less than 1; ",
    "train calibration=on calibration.scope=lora_last": "calibration.scope=lora_last: there is no adapter ",
    "train calibration=off calibration.alpha=1.1": "calibration.alpha",
    "train calibration=feedback calibration.feedback.high=-1": "calibration.feedback.high=-1.0: must be at ",
    "resume nowhere": "nowhere: is not a run folder ",
    "export taken": "the following arguments are required: OUT; `rcpo export --help` lists ",
    "export taken out": "taken: is not a run folder ",
    "export nowhere taken": "taken: exists; export writes a new folder only",
    "completion tcsh": "argument shell: invalid choice: 'tcsh' (choose from 'bash', 'zsh', 'fish'); ",
    "doctor now": "unrecognized arguments: now; `rcpo doctor --help` lists words and flags",
    "--colour": "unrecognized arguments: --colour; `rcpo --help` lists words and flags",
}
"""A line, and how its message begins."""
NEED_WORDS = ("resume", "sweep", "status", "cancel", "sync", "export", "compare", "dashboard", "watch",
              "completion")  # fmt: skip
EXPLAINS = ("--help", "-h", "help", *(f"{name} --help" for name in cli.COMMANDS), "resume -h", "help status",
            "train --config-dir mine experiment=base --cfg job", "train --cfg job --package objective",
            "train --config-dir mine objective=own experiment=base --help")  # fmt: skip


def messy_folder(folder: Path) -> None:
    """Files and model folders, each with one fault, and a folder of a user's own options."""
    tiny = Path(model_place("builtin:tiny"))
    shutil.copytree(tiny, folder / "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(tiny, folder / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(tiny, folder / "no-config", ignore=shutil.ignore_patterns("config.json"))
    (folder / "pickled/pytorch_model.bin").write_bytes(b"x")
    turn = {"role": "assistant", "content": "yes"}
    robot = {"prompt": [{"role": "robot", "content": "x"}], "chosen": [turn], "rejected": [turn]}
    pairs = [{"prompt": f"is it {i} ?", "chosen": f"it is {i} .", "rejected": "no ."} for i in range(40)]
    texts = {
        "empty.jsonl": "", "bad.jsonl": "prompt: x\n", "columns.jsonl": '{"a": 1, "b": 2}\n',
        "list.json": "[1, 2]\n", "roles.jsonl": json.dumps(robot) + "\n", "a-file": "x",
        "good.jsonl": "".join(json.dumps(pair) + "\n" for pair in pairs), "taken/notes.txt": "mine",
        "mine/objective/own.yaml": "# My own.\nname: dpo\nbeta: 0.3  # how I like it\n",
        "mine/objective/theirs.yaml": "name: dpo\nbetta: 1\n",
        "mine/experiment/base.yaml": "# @package _global_\ndefaults:\n  - override /calibration: 'on'\n"
        "train: {steps: 7}\nseed: 5\n",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    messy_folder(made)
    return made


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, tuple[int, str, str]]:
    """Exit code, output and error output of every line of this file, from one process."""
    env = os.environ | {"RCPO_CACHE": str(folder.with_name("cache"))}
    done = forked.script(RUN_ALL, cwd=folder, env=env, input=json.dumps([*MISTAKES, *EXPLAINS, *NEED_WORDS]))
    assert (done.returncode, done.stderr) == (0, "")
    return {line: tuple(answer) for line, answer in json.loads(done.stdout).items()}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    answers: dict[str, tuple[int, str, str]], folder: Path, line: str
) -> None:
    code, output, said = answers[line]
    assert (code, output) == (2, "")
    assert said.startswith("rcpo: " + MISTAKES[line].format(folder=folder))
    assert said.count("\n") == 1


def test_mistakes_and_explanations_leave_nothing_behind(
    answers: dict[str, tuple[int, str, str]], folder: Path
) -> None:
    """No runs/, outputs/, wandb/ or half an export."""
    assert tuple(sorted(path.name for path in folder.iterdir())) == ENTRIES
    assert [path.name for path in (folder / "taken").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("line", EXPLAINS)
def test_explanations_are_output_and_exit_code_0(answers: dict[str, tuple[int, str, str]], line: str) -> None:
    code, output, said = answers[line]
    assert (code, said) == (0, "")
    assert max(len(text) for text in output.splitlines()) <= 110


@pytest.mark.parametrize("name", NEED_WORDS)
def test_the_bare_name_of_a_command_that_needs_words_is_answered_with_its_help(
    answers: dict[str, tuple[int, str, str]], name: str
) -> None:
    assert answers[name] == (2, answers[f"{name} --help"][1], "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_says_what_every_word_and_flag_is_for(
    answers: dict[str, tuple[int, str, str]], name: str
) -> None:
    parser = command_parser(name)
    assert all(action.help for action in parser._actions)
    shown = answers[f"{name} --help"][1]
    assert shown.startswith(f"usage: rcpo {name}")
    assert parser.description is not None
    assert parser.description in shown


def test_help_names_every_command_and_where_to_start(answers: dict[str, tuple[int, str, str]]) -> None:
    output = answers["--help"][1]
    assert output == answers["help"][1] == answers["-h"][1]
    assert all(f"  {name}" in output for name in cli.COMMANDS)
    assert "rcpo train objective=simpo calibration=on" in output
    assert answers["help status"] == answers["status --help"]
    assert answers["resume -h"] == answers["resume --help"]


def test_train_help_explains_every_option_and_key(answers: dict[str, tuple[int, str, str]]) -> None:
    """Each objective with its own words; each key with its value and meaning."""
    lines = answers["train --help"][1].splitlines()
    for name in REGISTRY:
        (line,) = (text for text in lines if text[5:].split("  ")[0] == name and text[:3] == "   ")
        assert len(line.split()) > 3 + line.startswith("   *")
    assert "   * dpo " in answers["train --help"][1]
    (steps,) = (text for text in lines if text.startswith("  train.steps=null "))
    assert "Optimizer steps" in steps


def test_train_help_lists_what_all_objectives_have_after_what_one_has(
    answers: dict[str, tuple[int, str, str]],
) -> None:
    """Each with the comment of conf/every_objective.yaml."""
    lines = [line.strip() for line in answers["train --help"][1].splitlines()]
    shown = [line for line in lines if line.startswith("objective.")]
    assert [line.split("=")[0] for line in shown] == [
        "objective.beta",
        *(f"objective.{key}" for key in composition_defaults()),
    ]
    assert all(len(line.split()) > 3 for line in shown[1:])


def test_train_help_shows_what_the_other_words_choose(answers: dict[str, tuple[int, str, str]]) -> None:
    """A user's own objective and experiment, with their comments."""
    output = answers["train --config-dir mine objective=own experiment=base --help"][1]
    shown = {" ".join(line.split()) for line in output.splitlines()}
    assert {"* own My own.", "objective.beta=0.3 how I like it"} <= shown
    assert any(line.startswith("train.steps=7 ") for line in shown)
    assert any(line.startswith("calibration.scope=head ") for line in shown)


def test_an_experiment_sets_options_and_keys_of_the_root(answers: dict[str, tuple[int, str, str]]) -> None:
    """train.steps and seed stand in the root config, which an experiment must be able to override."""
    output = answers["train --config-dir mine experiment=base --cfg job"][1]
    assert "\n  steps: 7\n" in output
    assert "\nseed: 5\n" in output
    assert "\n  scope: head\n" in output


def test_cfg_with_a_package_prints_that_group_alone(answers: dict[str, tuple[int, str, str]]) -> None:
    first, *lines = answers["train --cfg job --package objective"][1].splitlines()
    assert first == "# @package objective"
    assert yaml.safe_load("\n".join(lines)) == {**composition_defaults(), "name": "dpo", "beta": 0.1}


def rcpo_command(words: list[str], cwd: Path) -> tuple[int, str, str]:
    """Run the installed command as a user does."""
    command = [str(Path(sys.executable).with_name("rcpo")), *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_the_installed_command_and_the_module_tell_the_same_version(tmp_path: Path) -> None:
    module = subprocess.run(
        [sys.executable, "-m", "rcpo.cli", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert rcpo_command(["--version"], tmp_path) == (0, f"rcpo {rcpo.__version__}\n", "")
    assert module.stdout == f"rcpo {rcpo.__version__}\n"


@pytest.mark.ci("real processes")
def test_a_mistake_in_the_installed_command_is_one_line(folder: Path, tmp_path: Path) -> None:
    """Found after everything heavy has been imported; libraries say nothing beside it."""
    code, output, said = rcpo_command(["train", f"model.path={folder}/no-weights"], tmp_path)
    expected = f"rcpo: model.path={folder}/no-weights: has no *.safetensors weights; give the folder of a "
    assert (code, output, said) == (2, "", f"{expected}whole model\n")
    assert list(tmp_path.iterdir()) == []


def test_processes_are_for_cpu_ranks_only() -> None:
    """The rule for machines with a GPU, without one."""
    tree = {
        "objective": {"name": "dpo"}, "calibration": {"name": "off"}, "model": {"path": "builtin:tiny"},
        "data": {"source": "arithmetic"}, "optim": {"name": "adamw"}, "deepspeed": {},
        "tracking": {"name": "none"}, "train": {}, "metrics": {}, "launch": {"processes": 2},
    }  # fmt: skip
    config = validate(tree)
    assert config.launch == LaunchConfig(processes=2)
    with pytest.raises(UserError) as caught:
        _launch(config, "cuda", None)
    assert str(caught.value) == "launch.processes=2: is for CPU ranks; type launch.gpus_per_node=2"
