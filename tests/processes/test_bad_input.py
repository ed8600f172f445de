"""The catalogue of bad input: what a user can get wrong in config, data, tokenizer, model, runs and files.
Each is one line on standard error that says what was seen and what to do, exit code 2, and nothing made,
changed or removed.

Every line goes through the whole of `rcpo.cli.main` in a process of its own (`command_lines.py`), in one of
two folders of the same faults (`bad_input_folder.py`). What is only cut, counted or warned of is in
`test_bad_input_survived.py`.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.bad_input_folder import make_folder
from helpers.command_lines import Answer, run_all
from helpers.selection import asked_for, matrix

CATALOGUE_FILE = ROOT / "tests/helpers/bad_input_catalogue.txt"
LINE = "must be one line of printable text, and not empty; type"
GENERATED = {
    f"train name={'a' * 300}": "name='aaaaaaaa ... aaa... (302 characters): must be 1 to 100 letters",
    "train name='\"a\u202etxt\"'": f'name="a\\u202Etxt": {LINE}',
    "train name='\"a\nb\"'": f"name= ... {LINE}",
    "train 'name=a\nb'": "name=a\\nb: cannot be read as KEY=VALUE; quote values that hold signs",
    "train tracking.entity='\"a\x1b[31m\"'": f"tracking.entity= ... {LINE}",
    f"train tracking.group={'g' * 129}": "tracking.group=gggg ... (129 characters): must be at most 128",
    f"train seed={'9' * 30}": f"seed={'9' * 30}: must be less than 9223372036854775808; type seed=VALUE",
    f"train data.seed={'9' * 30}": f"data.seed={'9' * 30}: must be less than 9223372036854775808; type",
    f"train train.max_length={'9' * 30}": "train.max_length=9999 ... must be less than or equal to 100000000",
    f"train data=file data.path={'x' * 300}.jsonl": "data.path=xxxx ... (306 characters): is no path (",
    f"train model.path={'x' * 300}": "model.path=xxxx ... : no such folder; give a model folder",
    f"train run_dir={'r' * 300}": "run_dir=rrrr ... (300 characters): a name in it is longer than 255 bytes",
}
"""Lines that a file shows badly: long ones, and those with control characters."""


def read_catalogue() -> dict[str, str]:
    """Command line without `rcpo`, and its message, of every entry of the file."""
    lines = CATALOGUE_FILE.read_text(encoding="utf-8").splitlines()
    entries = [
        (line.removeprefix("$ rcpo "), lines[number + 1])
        for number, line in enumerate(lines)
        if line[:1] == "$"
    ]
    assert len(dict(entries)) == len(entries), "a line is there twice"
    return dict(entries)


CATALOGUE = read_catalogue() | GENERATED
ADVICE = (
    r"\b(type|give|choose|did you mean|mend|quote|save|write|copy|convert|begin|leave|remove|use|merge)\b|"
    r"train with|must|it has|look at|`rcpo \w+ --help`"
)
"""What to do, in some words."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = [tmp_path_factory.mktemp("faults") for _ in range(2)]
    for folder in made:
        make_folder(folder)
    return made


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest, folders: list[Path]) -> dict[str, Answer]:
    """What every line of the catalogue did that a test of this session asks for."""
    cases = {params["line"]: shlex.split(params["line"]) for params in asked_for(request)}
    return run_all(cases, folders, {"RCPO_CACHE": str(folders[0].with_name("cache"))})


def test_the_catalogue_is_large_enough() -> None:
    assert len(CATALOGUE) > 150


def is_run_always(line: str) -> bool:
    """Every fourth line; the others with `pytest -m ci`."""
    return list(CATALOGUE).index(line) % 8 == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("line", matrix(CATALOGUE, is_run_always, "bad input"))
def test_bad_input_is_one_line_exit_code_2_and_touches_nothing(answers: dict[str, Answer], line: str) -> None:
    answer = answers[line]
    assert answer.said.startswith("rcpo: "), answer.said[-3000:]
    changes = [name for name in answer.changes if not name.endswith("/.lock")]  # `rcpo resume` leaves it
    assert (answer.code, answer.output, changes) == (2, "", [])
    message = answer.said.removesuffix("\n")
    assert message.isprintable(), "one line, and no control characters that came from the input"
    assert len(message) < 1000
    pattern = ".*".join(
        re.escape(part) for part in CATALOGUE[line].replace("{folder}", str(answer.folder)).split(" ... ")
    )
    assert re.match(f"rcpo: {pattern}", message), message
    assert re.search(ADVICE, message), message


SUBPROCESSES = [
    "train name=../../x",
    "train data=file data.path=deep.jsonl data.eval_pairs=8",
    "train model.path=other-kind train.steps=1",
]


@pytest.mark.ci("real processes")
@pytest.mark.parametrize("line", SUBPROCESSES)
def test_a_process_of_its_own_says_the_same(answers: dict[str, Answer], line: str) -> None:
    """The installed command, as a shell starts it."""
    command = [str(Path(sys.executable).with_name("rcpo")), *shlex.split(line)]
    done = subprocess.run(command, cwd=answers[line].folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", answers[line].said)


def test_no_code_of_a_pickle_was_run(answers: dict[str, Answer], folders: list[Path]) -> None:
    assert not any((folder / "pwned").exists() for folder in folders)
