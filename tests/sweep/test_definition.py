"""Sweep files: what they may say, which cells they stand for, and what every mistake says."""

import json
import re
from pathlib import Path

import pytest

from rcpo.common.errors import UserError
from rcpo.sweep.agents import wandb_sweep
from rcpo.sweep.definition import check_words, read_definition
from rcpo.sweep.expand import Point, expand


def written(folder: Path, text: str, name: str = "grid.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def cells_of(folder: Path, text: str) -> list[Point]:
    return expand(read_definition(written(folder, text)))


def test_the_grid_is_every_combination_with_seeds_last_and_fastest(tmp_path: Path) -> None:
    cells = cells_of(
        tmp_path,
        "overrides: [train.steps=9]\naxes: {objective: [dpo, simpo], optim.lr: [1e-6]}\nseeds: [0, 7]",
    )
    assert [cell.name for cell in cells] == [
        "dpo-lr1e-6-seed0", "dpo-lr1e-6-seed7", "simpo-lr1e-6-seed0", "simpo-lr1e-6-seed7",
    ]  # fmt: skip
    assert cells[1].axes == {"objective": "dpo", "optim.lr": "1e-6", "seed": "7"}
    assert cells[1].words == ["train.steps=9", "objective=dpo", "optim.lr=1e-6", "seed=7"]


@pytest.mark.parametrize("values", ["[off, on]", '["off", "on"]', "['off', on]"])
def test_off_and_on_stay_words_with_quotes_and_without(tmp_path: Path, values: str) -> None:
    cells = cells_of(tmp_path, f"axes: {{calibration: {values}}}")
    assert [cell.words for cell in cells] == [["calibration=off"], ["calibration=on"]]


def test_values_reach_the_command_line_as_they_were_typed(tmp_path: Path) -> None:
    """YAML would make 1.0e-6 of 1e-6 (a string), true of yes, and 8 of 010."""
    text = "axes: {optim.lr: [1e-6], model.lora.rank: [null, 010], a: [yes, [q, k]]}"
    words = {word for cell in cells_of(tmp_path, text) for word in cell.words}
    assert words == {
        "optim.lr=1e-6", "model.lora.rank=null", "model.lora.rank=010", "a=yes", "a=[q,k]",
    }  # fmt: skip


def test_a_labelled_value_stands_for_several_overrides(tmp_path: Path) -> None:
    text = "axes: {objective: [dpo, {label: b1, overrides: [objective=dpo, objective.beta=1]}]}"
    plain, labelled = cells_of(tmp_path, text)
    assert (plain.name, plain.words) == ("dpo", ["objective=dpo"])
    assert (labelled.name, labelled.words) == ("b1", ["objective=dpo", "objective.beta=1"])
    assert labelled.axes == {"objective": "b1"}


def test_exclude_leaves_out_what_matches_all_that_it_names(tmp_path: Path) -> None:
    text = "axes: {objective: [dpo, simpo, ipo], calibration: [off, on]}\nexclude:\n"
    cells = cells_of(tmp_path, text + "  - {objective: [dpo, ipo], calibration: on}\n")
    assert [cell.name for cell in cells] == ["dpo-off", "simpo-off", "simpo-on", "ipo-off"]


def test_include_adds_cells_over_all_values_of_what_it_does_not_name(tmp_path: Path) -> None:
    text = """
axes: {objective: [dpo], calibration: [off, on]}
seeds: [0]
include:
  - {objective: kto, seed: [7, 8], calibration: on}
  - {label: long, overrides: [train.steps=900]}
"""
    cells = {cell.name: cell for cell in cells_of(tmp_path, text)}
    assert list(cells)[2:] == ["kto-on-seed7", "kto-on-seed8", "dpo-off-seed0-long", "dpo-on-seed0-long"]
    assert cells["dpo-on-seed0-long"].words[-2:] == ["seed=0", "train.steps=900"]
    assert cells["dpo-on-seed0-long"].axes["include"] == "long"


def test_order_says_what_varies_slowest(tmp_path: Path) -> None:
    text = "axes: {objective: [dpo, ipo]}\nseeds: [0, 1]\norder: [seed]"
    assert [cell.name for cell in cells_of(tmp_path, text)] == [
        "dpo-seed0", "ipo-seed0", "dpo-seed1", "ipo-seed1",
    ]  # fmt: skip


def test_names_are_safe_unique_and_the_same_every_time(tmp_path: Path) -> None:
    """Two values that come to the same letters, a path, a shell's dream, and names that differ in case."""
    values = [
        "a/b",
        "a b",
        "../../etc",
        "$(rm -rf ~);`id`",
        "\\n'\"",
        "-x",
        "zz_top",
        "A_B",
        "ab",
        "AB",
        "x" * 300,
    ]
    text = "axes:\n  data.path:\n" + "".join(f"    - {json.dumps(value)}\n" for value in values)
    cells = cells_of(tmp_path, text)
    names = [cell.name for cell in cells]
    assert names == [cell.name for cell in cells_of(tmp_path, text)]
    assert len({name.casefold() for name in names}) == len(values)
    for name in names:
        assert name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        assert name[0].isalnum()
        assert len(name) <= 100
    assert re.fullmatch(r"path[._]+etc-[0-9a-f]{8}", names[2])
    assert names[6] == "pathzz_top"  # nothing was replaced and nothing collides


def test_a_name_template_may_leave_axes_out(tmp_path: Path) -> None:
    """Names that would be the same end in a digest of the cell's values."""
    text = "axes: {objective: [dpo, ipo]}\nseeds: [0, 1]\ncell_name: 'of-{objective}'"
    names = [cell.name for cell in cells_of(tmp_path, text)]
    assert [name[:7] for name in names] == ["of-dpo-", "of-dpo-", "of-ipo-", "of-ipo-"]
    assert len(set(names)) == 4


def test_overrides_of_the_command_line_are_of_every_cell(tmp_path: Path) -> None:
    path = written(tmp_path, "overrides: [a=1]\naxes: {objective: [dpo]}")
    assert expand(read_definition(path, ["b=2"]))[0].words == ["a=1", "b=2", "objective=dpo"]
    with pytest.raises(UserError, match="objective=ipo: objective is an axis of this sweep; remove one"):
        read_definition(path, ["objective=ipo"])


AXES = "axes: {objective: [dpo, ipo]}\n"
MISTAKES = {
    "": "must hold keys and values",
    "[1, 2]": "must hold keys and values",
    "a: [": "is not YAML",
    "overrides: [a=1]": "axes: has no value and needs one",
    "axes: {objective: dpo}": "axes.objective: must be a list; write [VALUE, ...]",
    "axes: {objective: []}": "axes.objective: must list at least one value",
    "axes: {objective: [dpo, 'dpo']}": "axes.objective: dpo is there twice",
    "axes: {objective: ['']}": "axes.objective: an empty value",
    "axes: {objective: [{label: x}]}": "axes.objective: a value with keys must be {label: NAME, ",
    "axes: {objective: [dpo], objective: [ipo]}": "is not YAML (objective is given twice",
    "axes: {label: [dpo]}": "axes.label: is not the name of a config key",
    "axes: {'a b': [dpo]}": "axes.a b: is not the name of a config key",
    "axes: {seed: [1]}\nseeds: [1]": "seeds: axes has seed too",
    AXES + "grid: {}": "grid: no such key; the keys are axes, ",
    AXES + "name: '../x'": "name: '../x': must be 1 to 100 letters",
    AXES + "name: '$(touch x)'": "name: '$(touch x)': must be 1 to 100 letters",
    AXES + "overrides: [--cfg]": "overrides: --cfg: must be KEY=VALUE",
    AXES + "overrides: [run_dir=x]": "overrides: run_dir=x: every cell's name and folder come from ",
    AXES + "exclude: [{objektive: dpo}]": "exclude: objektive is no axis of this sweep; its axes are ",
    AXES + "exclude: [{objective: kto}]": "exclude: objective has no value kto; it has dpo, ipo",
    AXES + "exclude: [{objective: [dpo, ipo]}]": "exclude: leaves no cell",
    AXES + "exclude: [dpo]": "exclude: each entry must name axes and values",
    AXES + "include: [{seed: 1}]": "include: seed is no axis of this sweep",
    AXES + "include: [{objective: dpo}]": "include: the cell {objective: dpo} is there already",
    AXES + "include: [{objective: dpo, overrides: [a=1]}]": "include: an entry with overrides needs a label",
    AXES + "order: [speed]": "order: speed is no axis of this sweep",
    AXES + "cell_name: '{speed}'": "cell_name: speed is no axis of this sweep",
    AXES + "estimate: {pairs_per_second: fast}": "estimate.pairs_per_second: fast: must be a number above 0",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_every_mistake_is_one_line_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        expand(read_definition(path))
    message = str(caught.value).removeprefix(f"{path}: ")
    assert message.startswith(MISTAKES[text])
    assert "\n" not in message


def test_words_of_the_command_line_are_overrides() -> None:
    with pytest.raises(UserError, match="name=x: every cell's name and folder come from the sweep"):
        check_words(["name=x"])


def test_a_wandb_sweep_runs_rcpo_train_with_words_that_w_and_b_itself_makes(tmp_path: Path) -> None:
    """W&B's own agent code turns the sweep's command and one choice of values into a command line."""
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    axes = "axes: {objective: [dpo], calibration: [off, on], optim.lr: [1e-6, 0.5]}"
    text = f"overrides: [train.steps=2]\n{axes}"
    sweep = yaml.safe_load(wandb_sweep(read_definition(written(tmp_path, text))))
    assert sweep["method"] == "grid"
    assert sweep["parameters"]["calibration"] == {"values": ["off", "on"]}
    assert sweep["parameters"]["optim.lr"] == {"values": [1e-6, 0.5]}
    chosen = {name: {"value": choice["values"][0]} for name, choice in sweep["parameters"].items()}
    arguments = create_sweep_command_args({"args": chosen})
    command = []
    for word in sweep["command"]:
        command += arguments["args_no_hyphens"] if word == "${args_no_hyphens}" else [word]
    assert command == [
        "${env}", "rcpo", "train", "train.steps=2", "objective=dpo", "calibration=off", "optim.lr=1e-06",
    ]  # fmt: skip


def test_a_wandb_sweep_refuses_what_w_and_b_cannot_say(tmp_path: Path) -> None:
    labelled = "axes: {objective: [{label: x, overrides: [objective=dpo, objective.beta=1]}]}"
    with pytest.raises(UserError, match="objective: x stands for several overrides"):
        wandb_sweep(read_definition(written(tmp_path, labelled)))
    with pytest.raises(UserError, match="no exclude and no include"):
        wandb_sweep(read_definition(written(tmp_path, AXES + "exclude: [{objective: dpo}]")))
