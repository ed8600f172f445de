"""Every command that a README prints: it runs, or is listed with the reason why not; its words are right.

They run one after another, as a reader types them, in one folder that holds what their placeholders name
(MODEL, PAIRS.jsonl, RUN, ...). `helpers.readme_runs` makes them small.
"""

import itertools
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from helpers import ROOT
from helpers.readme_runs import furnish, run, run_python, typed
from helpers.readmes import all_commands, code, readmes, spans, words
from helpers.selection import matrix
from rcpo import cli
from rcpo.commands import COMMANDS
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.validate import validate
from rcpo.sweep.inline import definition_of_words

NOT_RUN = {
    r"^pip ": "installs packages; .ci/run does it",
    r"^pytest": "runs this",
    r"^\.ci/run$": "runs this, among others",
    r"^eval ": "is for a shell; tests/processes/test_completion.py does it",
    r"^sbatch |--slurm": "needs a SLURM cluster; tests/ci/test_slurm.py has one",
    r"gpus_per_node|^torchrun": "needs GPUs; tests/processes/test_launch.py runs torchrun on a CPU",
    r"model=(smollm2|pythia|mistral)": "needs a model of the hub",
    r"--wandb ENTITY|^rcpo sync|^rcpo dashboard (?!.*--print)": "needs W&B; tests/report have a server",
    r"^rcpo judge": "needs a judge; tests/evaluation/test_judge.py has one",
    r"^rcpo lab (persona|refusal)": "trains for minutes; tests/evaluation/test_one_token.py and others do",
    r"engine=vllm": "needs vLLM; tests/evaluation/test_vllm.py asks it where it is installed",
    r"^rcpo weigh": "needs rows that name their sources; tests/report/test_weigh.py has some",
    r"^rcpo bench": "takes minutes; tests/trainings/test_bench.py does the like",
    r"RUN\|": "is a synopsis; the README's first commands are examples of it",
    r"make_tiny": "trains for minutes; tests/models/test_builtin.py runs a part",
    r"config\.keys": "writes into the source tree; test_readme.py compares what it prints",
    r"launch\.processes=4": "starts four ranks; tests/trainings/test_resume.py changes their number",
}
"""Pattern of a command, and why it is not run here."""
COMPOSED = ("train", "data", "score", "bench", "sweep")
"""Commands whose KEY=VALUE words are those of `rcpo train`."""
WITH_A_VALUE = ("--images", "--shape", "--lengths", "--variant")
"""Flags before values that hold a =, too."""


def reason_not_to_run(command: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, command)), None)


PRINTED = all_commands()
RUN_HERE = [command for command in PRINTED if reason_not_to_run(command) is None]
OF_RCPO = [command for command in PRINTED if words(command)[0] in ("rcpo", "torchrun")]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompletedProcess[str]]:
    place = tmp_path_factory.mktemp("readme") / "place"
    place.mkdir()
    furnish(place)
    return {command: run(typed(command, number, place), place) for number, command in enumerate(RUN_HERE)}


@pytest.mark.ci("commands of the READMEs")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", RUN_HERE)
def test_a_printed_command_runs(answers: dict[str, CompletedProcess[str]], command: str) -> None:
    done = answers[command]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.ci("commands of the READMEs")
@pytest.mark.parametrize("readme", ["README.md", "rcpo/library/README.md"])
def test_printed_python_runs(tmp_path: Path, readme: str) -> None:
    """It trains, reads what came out, and compares."""
    furnish(tmp_path)
    block = next(block for block in code(ROOT / readme, "python") if "rcpo.train(" in block)
    done = run_python(block, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "command", matrix(OF_RCPO, OF_RCPO[::3].__contains__, "words of the READMEs' commands")
)
def test_words_of_a_printed_command_are_right(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its flags are in the command's help; groups, options, keys and values compose and validate."""
    line = words(command.replace("-m rcpo.cli", "rcpo"))
    name, rest = line[line.index("rcpo") + 1], line[line.index("rcpo") + 2 :]
    assert name in COMMANDS
    flags = {word.split("=")[0] for word in rest if word.startswith("--")} - {"--help"}
    for flag in sorted(flags):
        assert flag in help_of(name, capsys), f"rcpo {name} --help does not know {flag}"
    own = [word for flag, word in itertools.pairwise(["", *rest]) if flag not in WITH_A_VALUE]
    overrides = [word for word in own if re.match(r"[a-z_.]+=", word)]
    is_own = "--config-dir" in flags or any(word.startswith("objective.module=") for word in own)
    if "-m" in rest and overrides:
        axes = definition_of_words(overrides).axes.values()
        overrides = [word for values in axes for word in values[0].words]
    if name in COMPOSED and not is_own:
        tree = compose(overrides)
        assert tree is not None
        validate(tree)


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_a_wrong_flag_or_key_would_be_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--paralel" not in help_of("sweep", capsys)
    with pytest.raises(UserError, match=r"objective\.betta"):
        compose(["objective.betta=1"])


def test_every_reason_has_a_command() -> None:
    unused = [pattern for pattern in NOT_RUN if not any(re.search(pattern, command) for command in PRINTED)]
    assert not unused


def test_every_command_named_exists() -> None:
    named = {
        span.split()[1] for readme in readmes() for span in spans(readme) if re.match(r"rcpo [a-z]", span)
    }
    assert len(named) > 8
    assert named <= set(COMMANDS)


def test_scripts_named_in_reasons_exist() -> None:
    for reason in NOT_RUN.values():
        for path in re.findall(r"tests/[\w/]+(?:\.py)?", reason):
            assert Path(ROOT, path).exists(), path
