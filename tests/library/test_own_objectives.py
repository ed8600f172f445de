"""Objectives of users' own: registering, the words that choose one, the module that a config names, entry
points, what is said to mistakes, and what a run folder keeps."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rcpo
from rcpo.common.conf import conf_dir
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.validate import validate
from rcpo.config.words import hydra_words
from rcpo.objectives import PairLogProbs, load_objective, objective_names, objective_of
from rcpo.objectives.composition import composition_defaults
from rcpo.objectives.own import import_own
from rcpo.objectives.registry import OWN
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree, open_run
from rcpo.sweep.definition import read_definition
from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.freeze import freeze_cells
from rcpo.sweep.target import Here

LOSSES = '''
from dataclasses import dataclass

import torch.nn.functional as F

import rcpo
from neighbour import SCALE


@dataclass(frozen=True)
class MyConfig:
    k: float = 0.1
    kind: str = "plain"


@rcpo.objectives.register("my_loss", MyConfig, needs_reference=True)
def my_loss(pair, config):
    """-log sigmoid(k * mt), per pair (B,)."""
    return -SCALE * F.logsigmoid(config.k * pair.margin())
'''
PLAIN = """
import rcpo

@rcpo.objectives.register("my_loss", needs_reference=True)
def my_loss(pair, config):
    return {loss}
"""
ONE = PairLogProbs(*(torch.tensor([value]) for value in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
"""mt = 2."""


@pytest.fixture(autouse=True)
def registered_nowhere_else() -> Iterator[None]:
    before = dict(OWN)
    yield
    OWN.clear()
    OWN.update(before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with my_losses.py and its neighbour, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_losses.py").write_text(LOSSES)
    (tmp_path / "neighbour.py").write_text("SCALE = 1.0\n")
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    return tmp_path


def config_of(*words: str) -> ResolvedConfig:
    tree = compose([*words, "tracking=none", "train.device=cpu", "run_dir=runs/r"])
    assert tree is not None
    return resolve(validate(tree), None)


WORDS = {
    "group": ["objective=my_loss", "objective.k=0.3"],
    "name": ["objective.name=my_loss", "objective.k=0.3"],
    "plus": ["+objective.k=0.3", "objective=my_loss"],
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_words_choose_it_as_one_of_rcpos_own(here: Path, words: list[str]) -> None:
    """Parameters that are not given stand in the frozen config too, and the file by its absolute path."""
    section = config_of("objective.module=my_losses.py", *words).objective
    own = {key: section[key] for key in ("name", "k", "kind", "module")}
    assert own == {"name": "my_loss", "k": 0.3, "kind": "plain", "module": str(here / "my_losses.py")}
    assert set(section) - set(own) == set(composition_defaults()) - {"module"}
    loss = config_of("objective.module=my_losses.py", *words).objective_function(ONE)
    assert loss.item() == pytest.approx(load_objective("dpo", beta=0.3)(ONE).item())


def test_a_file_of_options_chooses_it_and_its_neighbour_is_found(here: Path) -> None:
    """DIR/objective/mine.yaml names near.py, which lies in DIR."""
    folder = here / "options"
    (folder / "objective").mkdir(parents=True)
    (folder / "near.py").write_text(PLAIN.format(loss="-2 * pair.margin()"))
    (folder / "objective" / "mine.yaml").write_text("name: my_loss\nmodule: near.py\n")
    config = config_of("--config-dir", "options", "objective=mine")
    assert config.objective["module"] == str(folder / "near.py")
    assert config.objective_function(ONE).item() == -4


def test_one_that_is_registered_in_this_process_needs_no_module() -> None:
    """As in a notebook, where a cell that runs again registers again."""
    for factor in (1.0, 3.0):

        @rcpo.objectives.register("mine", needs_reference=True)
        def mine(pair: PairLogProbs, config: Any, factor: float = factor) -> torch.Tensor:
            return -factor * pair.margin()

    assert config_of("objective=mine").objective_function(ONE).item() == -6
    assert "mine" in objective_names()
    mixed = config_of("objective=mix", "objective.terms=[{name: mine, weight: 0.5}]")
    assert mixed.objective_function(ONE).item() == -3


def test_shipped_objectives_keep_their_words(here: Path) -> None:
    """A module beside objective=simpo changes nothing, and neither does objective.name of one that ships."""
    with_module = config_of("objective=simpo", "objective.module=my_losses.py").objective
    assert with_module | {"module": None} == config_of("objective=simpo").objective
    folders = [conf_dir()]
    assert hydra_words(["objective.name=simpo"], folders) == ["objective.name=simpo"]
    assert hydra_words(["objective=simp"], folders) == ["objective=simp"]
    assert hydra_words(["calibration=True", "--package", "objective"], folders) == [
        "calibration=on", "--package", "objective",
    ]  # fmt: skip


def test_a_changed_file_is_imported_again_for_a_new_run_and_not_in_one_that_trains(here: Path) -> None:
    words = ("objective.module=my_losses.py", "objective=my_loss")
    first = config_of(*words)
    (here / "my_losses.py").write_text(PLAIN.format(loss="-7 * pair.margin()"))
    assert first.objective_function(ONE).item() == pytest.approx(load_objective("dpo", beta=0.1)(ONE).item())
    assert config_of(*words).objective_function(ONE).item() == -14


def test_two_modules_may_use_one_name(here: Path) -> None:
    """The config's own module decides, whatever was imported last."""
    (here / "other.py").write_text(PLAIN.format(loss="-5 * pair.margin()"))
    for _ in range(2):
        assert (
            config_of("objective.module=other.py", "objective=my_loss").objective_function(ONE).item() == -10
        )
        mine = config_of("objective.module=my_losses.py", "objective=my_loss")
        assert mine.objective_function(ONE).item() < 1


def test_a_python_module_may_be_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    config = config_of("objective.module=my_losses", "objective=my_loss")
    assert config.objective["module"] == "my_losses"
    assert import_own("my_losses").file == here / "my_losses.py"


def test_cells_of_a_sweep_have_it(here: Path) -> None:
    (here / "grid.yaml").write_text(
        "overrides: [objective.module=my_losses.py, tracking=none, train.device=cpu]\n"
        "axes: {objective: [dpo, my_loss, {label: k3, overrides: [objective=my_loss, objective.k=0.3]}]}\n"
    )
    cells = freeze_cells(read_definition("grid.yaml"), SweepFolder("out"), Here())
    seen = [(frozen.config.objective["name"], frozen.config.objective.get("k")) for frozen in cells]
    assert seen == [("dpo", None), ("my_loss", 0.1), ("my_loss", 0.3)]


# Entry points


@pytest.fixture
def installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(here)
    for name in ("theirs", "empty", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (here / "theirs.py").write_text(PLAIN.format(loss="-pair.margin()").replace("my_loss", "theirs"))
    (here / "empty.py").write_text("")
    (here / "broken.py").write_text("import nothing_of_that_name\n")
    package = here / "theirs-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[rcpo.objectives]\ntheirs = theirs\nempty = empty\nbroken = broken\n"
    )


@pytest.mark.usefixtures("installed")
def test_an_installed_packages_objective_is_imported_when_it_is_asked_for() -> None:
    assert "theirs" in objective_names()
    assert "theirs" not in sys.modules
    assert config_of("objective=theirs").objective_function(ONE).item() == -2
    assert "theirs" in sys.modules


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "objective=empty: the entry point of that name registers no such objective; tell"),
        (
            "broken",
            "objective=broken: the package that has it cannot be imported (ModuleNotFound",
        ),
    ],
)
def test_a_package_that_does_not_hold_its_word_is_one_line(name: str, message: str) -> None:
    with pytest.raises(rcpo.UserError) as caught:
        config_of(f"objective={name}")
    assert str(caught.value).startswith(message)


# Mistakes


FILE, IMPORTED = "objective.module={file}: ", "objective.module={file}: cannot be imported ("
BROKEN = {
    "syntax": ("def f(:", IMPORTED + "line 1: SyntaxError: invalid syntax); mend"),
    "raises": ("\n1 / 0", IMPORTED + "line 2: ZeroDivisionError: division by"),
    "exits": ("raise SystemExit(3)", IMPORTED + "line 1: SystemExit: 3); mend it"),
    "nothing": ("x = 1", FILE + "registers no objective; decorate a function of it"),
    "name": (
        PLAIN.format(loss="0").replace("my_loss", "dpo"),
        IMPORTED + "line 4: ValueError: objective 'dpo' is one of rcpo's",
    ),
    "config": (
        "import rcpo\nrcpo.objectives.register('my_loss', int, needs_reference=True)(lambda pair, config: 0)",
        IMPORTED + "line 2: TypeError: objective 'my_loss': its config must be",
    ),
    "mean": (
        PLAIN.format(loss="-pair.margin().mean()"),
        "objective=my_loss: gave shape () for 3 pairs; return one loss a pair, (B,), without their mean",
    ),
    "number": (PLAIN.format(loss="3"), "objective=my_loss: gave int for 3 pairs; return one loss a pair"),
    "fails": (
        PLAIN.format(loss="pair.nope"),
        "objective=my_loss: it fails on three pairs (AttributeError: 'PairLogProbs' object has no attribute",
    ),
    "detached": (
        PLAIN.format(loss="pair.margin().detach()"),
        "objective=my_loss: its loss has no derivative by z_w or z_l; compute it from them, in torch",
    ),
    "joined": (
        PLAIN.format(loss="pair.margin() * pair.margin().mean()"),
        "objective=my_loss: the loss of a pair depends on the other pairs of its batch, so that it would",
    ),
    "reference": (
        PLAIN.format(loss="-pair.margin()").replace("=True", "=False"),
        "objective=my_loss: it reads ref_w or ref_l; register it with needs_reference=True",
    ),
    "tokens and mismatched": (
        PLAIN.format(loss="pair.margin()").replace(
            "=True",
            "=True, weighs_tokens=True, statistics=(rcpo.objectives.BatchStatistic("
            "len, lambda length: (), lambda state, mean: (), of_mismatched=True),)",
        ),
        "objective=my_loss: it weighs tokens, which mismatched pairs are not scored by; leave one of the two",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_module_that_cannot_train_is_one_line(here: Path, name: str) -> None:
    text, message = BROKEN[name]
    file = here / "wrong.py"
    file.write_text(text)
    with pytest.raises(rcpo.UserError) as caught:
        objective_of({"name": "my_loss", "module": str(file)})
    assert str(caught.value).startswith(message.format(file=file))


MINE = ("objective.module=my_losses.py", "objective=my_loss")
WRONG = {
    ("objective.module=nope.py", "objective=my_loss"): "objective.module=nope.py: cannot be read (No such",
    ("objective.module=nope.losses", "objective=a"): "objective.module=nope.losses: there is no such module",
    ("objective.module=3",): "objective.module=3: names no module; type objective.module=FILE.py",
    (MINE[0], "objective=my_los"): "objective=my_los: no such objective; choose one of",
    (*MINE, "objective.kk=1"): "objective.kk=1: my_loss has no such parameter; did you mean objective.k?",
    (*MINE, "objective.k=x"): "objective.k=x: must be a finite number",
    (*MINE, "objective.kind=3"): "objective.kind=3: must be text",
    ("objective=my_loss",): "objective=my_loss: no such option; choose one of acpo, ",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_wrong_words_are_one_line(here: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(rcpo.UserError) as caught:
        config_of(*words)
    assert str(caught.value).startswith(WRONG[words])


# The run folder


def made_run(here: Path) -> RunFolder:
    config = config_of("objective.module=my_losses.py", "objective=my_loss")
    run = RunFolder(here / "runs" / "r")
    run.create(config, config_tree(config))
    return run


def test_a_run_keeps_a_copy_and_says_that_the_file_has_changed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(here)
    assert (run.path / "objective_module.py").read_text() == LOSSES
    run.reopen()
    assert capsys.readouterr().err == ""
    before = run.read_run()["objective_module"]["sha256"]
    with (here / "my_losses.py").open("a") as stream:
        stream.write("# another\n")
    run.reopen()
    said = capsys.readouterr().err
    assert said == (
        f"rcpo: warning: {here}/my_losses.py has changed since this run was made; as it was then: "
        f"{run.path}/objective_module.py\n"
    )
    assert run.read_run()["objective_module"]["before"] == [before]
    run.reopen()
    assert capsys.readouterr().err == "", "it is said once"


def test_a_lost_module_is_said_with_where_its_copy_is(here: Path) -> None:
    run = made_run(here)
    assert open_run(str(run.path))[1].objective_function.name == "my_loss"
    (here / "my_losses.py").unlink()
    with pytest.raises(rcpo.UserError) as caught:
        open_run(str(run.path))
    assert str(caught.value) == (
        f"objective.module={here}/my_losses.py: is not there any more; put it back, from "
        f"{run.path}/objective_module.py say"
    )
    assert rcpo.open_run(run.path).facts["objective_module"]["path"] == f"{here}/my_losses.py"


def test_runs_without_a_module_have_none(here: Path) -> None:
    config = config_of("objective=dpo")
    run = RunFolder(here / "runs" / "plain")
    run.create(config, config_tree(config))
    assert "objective_module" not in run.read_run()
    assert not (run.path / "objective_module.py").exists()
