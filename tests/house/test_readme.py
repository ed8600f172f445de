"""README says what is so: its commands compose, its tables list what exists, its files are there."""

import re
import shlex

import pytest

from helpers import ROOT
from rcpo.cli import COMMANDS
from rcpo.config.compose import compose
from rcpo.config.validate import validate
from rcpo.monitor.model_card import formula
from rcpo.objectives import REGISTRY, load_objective

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [line[4:] for line in README.split("\n") if line.startswith("    ")]
SPANS = re.findall(r"`(rcpo [a-z][^`]*)`", README)
COMMANDS_SHOWN = [line.split("&& ")[-1] for line in BLOCKS if "rcpo train" in line] + [
    span for span in SPANS if span.startswith("rcpo train") and "..." not in span
]


def test_the_two_commands_are_there() -> None:
    assert "pip install -e . && rcpo train objective=simpo calibration=on" in BLOCKS
    assert "pip install -e '.[test]' && pytest" in BLOCKS
    assert len(COMMANDS_SHOWN) >= 5


@pytest.mark.parametrize("command", COMMANDS_SHOWN)
def test_every_train_command_composes_and_validates(command: str) -> None:
    """Names of groups, options, keys and values are right; the machine and the files are another matter."""
    words = shlex.split(command.replace("rcpo.cli", "rcpo"))
    words = words[words.index("train") + 1 :]
    if {"--help", "--cfg", "--config-dir"} & set(words):
        return
    tree = compose(words)
    assert tree is not None
    validate(tree)


def test_every_command_named_exists() -> None:
    assert {span.split()[1] for span in SPANS} <= set(COMMANDS)


def test_the_objectives_table_is_the_registry() -> None:
    """One line an objective: its formula, its defaults and whether it needs a reference."""
    rows = {
        row[0]: row for row in re.findall(r"^\| `(\w+)` \| (.+) \| (.*) \| (yes|no) \|.*\|$", README, re.M)
    }
    assert sorted(rows) == sorted(REGISTRY)
    for name, (_, loss, defaults, reference) in rows.items():
        objective = load_objective(name)
        assert loss == formula(objective).replace("|", "\\|").split(", per pair")[0]
        params = ", ".join(f"{key} {value}" for key, value in objective.params().items())
        assert defaults == ("terms" if name == "mix" else params)
        assert reference == ("yes" if objective.needs_reference else "no")
    assert f"any of {len(REGISTRY)} objectives" in README


def test_every_file_named_exists() -> None:
    """Paths of the file map, the walk of one batch and the pictures."""
    paths = set(re.findall(r"(?<![\w/-])((?:rcpo|conf|tests|\.readme|\.ci)/[\w./-]*)", README))
    walked = {f"rcpo/{path}" for path in re.findall(r"`((?!rcpo/|tests/)(?:\w+/)*\w+\.py)`", README)}
    found = {path.rstrip(".") for path in paths} | walked
    found.remove("conf/objective/mine.yaml")  # the reader's own
    assert len(found) > 30
    assert [path for path in sorted(found) if not (ROOT / path).exists()] == []


def test_every_metric_named_is_written() -> None:
    """Prefixes of the metrics table are the ones that rcpo writes."""
    source = "".join(path.read_text() for path in (ROOT / "rcpo").rglob("*.py"))
    for key in re.findall(r"^\| `(\w+/\w+)`", README, re.M):
        prefix, name = key.split("/")
        assert f'"{key}"' in source or (prefix == "population" and name == "cosine"), key
