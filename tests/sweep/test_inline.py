"""Grids from the words of `rcpo train -m`: the same cells as of a sweep file, in a folder that the same words
find again. `tests/processes/test_sweep_runs.py` runs one, `test_bad_input.py` has what is refused."""

from pathlib import Path

import pytest

from rcpo.runs.frozen import config_tree
from rcpo.sweep.definition import definition_of
from rcpo.sweep.expand import expand
from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.freeze import freeze_cells
from rcpo.sweep.grow import plan_growth, write_growth
from rcpo.sweep.inline import definition_of_words
from rcpo.sweep.target import Here

WORDS = ["objective=dpo,simpo", "train.steps=3", "calibration=true,off", "seed=range(2)", "tracking=none"]


def test_words_are_the_sweep_that_a_file_would_say() -> None:
    """And so all its cells: their names, axes and words."""
    inline = definition_of_words([*WORDS, "name=grid"])
    file = definition_of(
        {
            "name": "grid",
            "overrides": ["train.steps=3", "tracking=none"],
            "axes": {"objective": ["dpo", "simpo"], "calibration": ["on", "off"]},
            "seeds": ["0", "1"],
        },
        "grid",
        [],
    )
    assert inline == file
    assert [point.name for point in expand(inline)][:3] == ["dpo-on-seed0", "dpo-on-seed1", "dpo-off-seed0"]


def test_the_same_words_find_the_same_sweep_in_any_order() -> None:
    """The name has the axes and a digest of the other words: other values make the sweep grow, another
    train.steps is another sweep."""
    name = definition_of_words(WORDS).name
    assert name.startswith("objective-calibration-seed-")
    assert definition_of_words([*WORDS[:1], "tracking=none", *WORDS[2:4], "train.steps=3"]).name == name
    assert definition_of_words([*WORDS[:3], "seed=range(5)", "tracking=none"]).name == name
    assert definition_of_words([*WORDS[:3], "seed=range(2)", "train.steps=4"]).name != name
    assert definition_of_words(["optim.lr=1e-5,1e-6", "+deepspeed.extra.a=1,2"]).name == "lr-a"


def test_the_same_words_again_have_nothing_new_and_more_values_only_what_is_missing(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path / "sweep")

    def planned(*words: str) -> list[str]:
        definition = definition_of_words([*words, "tracking=none"])
        growth = plan_growth(definition, sweep, Here())
        if growth.new:
            write_growth(sweep, definition, growth)
        return [frozen.cell.name for frozen in growth.new]

    sweep.path.mkdir()
    assert planned("objective=dpo,simpo") == ["dpo", "simpo"]
    assert planned("objective=dpo,simpo") == []
    assert planned("objective=simpo,ipo,dpo") == ["ipo"]


def test_options_of_ones_own_and_of_a_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--config-dir holds for every cell, wherever it is resumed from."""
    (tmp_path / "mine/objective").mkdir(parents=True)
    (tmp_path / "mine/objective/dpo_low.yaml").write_text("name: dpo\nbeta: 0.02\n")
    monkeypatch.chdir(tmp_path)
    definition = definition_of_words(["--config-dir", "mine", "objective=glob([dpo*,ipo],exclude=dpo_norm)"])
    assert [value.label for value in definition.axes["objective"]] == [
        "dpo",
        "dpo_low",
        "dpo_shift",
        "dpop",
        "ipo",
    ]
    cells = freeze_cells(definition, SweepFolder(tmp_path / "out"), Here())
    assert config_tree(cells[1].config)["objective"]["beta"] == 0.02
    assert cells[1].cell.words[:2] == ["--config-dir", str(tmp_path / "mine")]
