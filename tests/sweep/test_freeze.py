"""Frozen cells: what a sweep folder holds before anything runs, and that it never changes afterwards."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import rcpo.runs.folder
from helpers import ROOT
from rcpo.common.code_version import code_hash
from rcpo.common.errors import UserError
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.sweep.definition import Definition, read_definition
from rcpo.sweep.expand import expand
from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.freeze import FrozenCell, freeze_cell, freeze_cells
from rcpo.sweep.grow import mend, plan_growth, write_growth
from rcpo.sweep.target import Here

GRID = """
name: small
overrides: [tracking=none, train.steps=3, "tracking.tags=[mine]"]
axes: {objective: [dpo], calibration: [off, on]}
"""


def make(folder: Path, text: str = GRID, *more: str) -> tuple[SweepFolder, list[FrozenCell]]:
    """Freeze and write the sweep of this file."""
    (folder / "grid.yaml").write_text(text)
    definition = read_definition(str(folder / "grid.yaml"), more)
    sweep = SweepFolder(folder / "out")
    sweep.path.mkdir(exist_ok=True)
    growth = plan_growth(definition, sweep, Here())
    if growth.new:
        write_growth(sweep, definition, growth)
    return sweep, growth.new or freeze_cells(definition, sweep, Here())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_frozen_cell_is_a_run_that_is_pending(tmp_path: Path) -> None:
    sweep, cells = make(tmp_path)
    assert sweep.read_cells() == [frozen.cell for frozen in cells]
    assert [cell.name for cell in sweep.read_cells()] == ["dpo-off", "dpo-on"]
    for frozen in cells:
        run, config = open_run(str(sweep.run(frozen.cell).path))
        assert config == frozen.config
        assert (config.name, config.run_dir) == (frozen.cell.name, str(run.path))
        known = run.read_run()
        assert (known["status"], known["source_hash"]) == ("pending", code_hash())
        assert len(known["wandb_id"]) == 12
        assert "started" not in known
    assert len({sweep.run(frozen.cell).read_run()["wandb_id"] for frozen in cells}) == 2
    assert yaml.safe_load(sweep.sweep_yaml.read_text())["axes"]["calibration"] == ["off", "on"]


def test_wandb_gets_the_sweep_as_group_and_a_tag_for_each_axis(tmp_path: Path) -> None:
    """Beside the tags of every run and the user's own."""
    _, cells = make(tmp_path)
    tracking = cells[1].config.tracking
    assert tracking.group == "small"
    assert {"mine", "objective=dpo", "calibration=on", "dpo", "tiny"} <= set(tracking.tags)
    (tmp_path / "named").mkdir()
    _, named = make(tmp_path / "named", GRID + "group: 'a, [b]'\n")
    assert named[0].config.tracking.group == "a, [b]"


def test_the_same_sweep_again_changes_nothing(tmp_path: Path) -> None:
    sweep, _ = make(tmp_path)
    before = contents(sweep.path)
    make(tmp_path)
    assert contents(sweep.path) == before


def test_a_changed_cell_is_refused_with_the_difference(tmp_path: Path) -> None:
    sweep, _ = make(tmp_path)
    before = contents(sweep.path)
    with pytest.raises(UserError, match=r"frozen otherwise \(train.steps: 3 -> 4 in 2 cells\); type --out"):
        make(tmp_path, GRID.replace("steps=3", "steps=4"))
    with pytest.raises(UserError, match=r"optim.lr: 0.0003 -> 0.01 in 2 cells"):
        make(tmp_path, GRID, "optim.lr=0.01")
    more = GRID.replace("[dpo]", "[dpo, ipo]").replace("steps=3", "steps=4")
    with pytest.raises(UserError, match=r"train.steps: 3 -> 4 in 2 cells"):
        make(tmp_path, more)
    assert contents(sweep.path) == before


def test_a_sweep_grows_and_what_is_there_stays_byte_for_byte(tmp_path: Path) -> None:
    """Another objective, a value that gives every name another form, and seeds: the two cells keep their
    names, their places and their files; only new cells are composed."""
    sweep, _ = make(tmp_path)
    before = contents(sweep.cells)
    more = GRID.replace("[dpo]", "[ipo, dpo, {label: 05, overrides: [objective=dpo, objective.beta=0.5]}]")
    (tmp_path / "grid.yaml").write_text(more)
    definition = read_definition(str(tmp_path / "grid.yaml"))
    growth = plan_growth(definition, sweep, Here())
    assert [frozen.cell.name for frozen in growth.new] == [
        "objectiveipo-off", "objectiveipo-on", "objective05-off", "objective05-on",
    ]  # fmt: skip
    assert growth.line(sweep) == f"6 cells in {sweep.path}, 4 of them new"
    write_growth(sweep, definition, growth)
    assert [cell.name for cell in sweep.read_cells()][:3] == ["dpo-off", "dpo-on", "objectiveipo-off"]
    after = contents(sweep.cells)
    assert {name: after[name] for name in before} == before
    assert plan_growth(definition, sweep, Here()).new == []


def test_a_value_that_is_left_out_keeps_its_cells(tmp_path: Path) -> None:
    sweep, _ = make(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID.replace("[off, on]", "[on]"))
    growth = plan_growth(read_definition(str(tmp_path / "grid.yaml")), sweep, Here())
    assert (growth.new, growth.names) == ([], ["dpo-on"])
    assert [cell.name for cell in growth.manifest] == ["dpo-off", "dpo-on"]
    assert growth.line(sweep).endswith("; 1 more there, which the file does not name")


def test_a_cell_that_is_as_it_was_is_not_composed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While conf/ is what it was: composing ninety cells takes ten seconds."""
    sweep, _ = make(tmp_path)
    monkeypatch.setattr("rcpo.sweep.freeze.compose", lambda words: pytest.fail("composed"))
    definition = read_definition(str(tmp_path / "grid.yaml"))
    assert plan_growth(definition, sweep, Here()).new == []
    monkeypatch.setattr("rcpo.sweep.grow._mark_of", lambda target: "another conf/")
    with pytest.raises(pytest.fail.Exception, match="composed"):
        plan_growth(definition, sweep, Here())


@pytest.mark.parametrize("how", ["sweep", "resume"])
def test_a_cell_whose_folder_is_gone_is_frozen_again(tmp_path: Path, how: str) -> None:
    sweep, cells = make(tmp_path)
    run = sweep.run(cells[1].cell)
    before = open_run(str(run.path))[1]
    shutil.rmtree(run.path)
    if how == "sweep":
        make(tmp_path)
    else:
        assert mend(sweep) == ["dpo-on"]
        assert mend(sweep) == []
    assert open_run(str(run.path))[1] == before
    assert run.read_run()["status"] == "pending"
    assert sweep.read_cells() == [frozen.cell for frozen in cells]


def test_a_key_that_an_older_rcpo_did_not_write_is_no_change(tmp_path: Path) -> None:
    sweep, cells = make(tmp_path)
    config = sweep.run(cells[0].cell).config
    tree = yaml.safe_load(config.read_text())
    del tree["train"]["share_prefix"]
    config.write_text(yaml.safe_dump(tree))
    old = sweep.manifest.read_text().replace(cells[0].cell.digest, "0" * 16)
    sweep.manifest.write_text(old)
    sweep.sweep_yaml.write_text(sweep.sweep_yaml.read_text().replace("frozen_with: ", "frozen_with: x"))
    make(tmp_path)
    assert sweep.manifest.read_text() == old


def test_sweeps_that_ship_are_found_by_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("demo", "demo.yaml", "sweeps/demo.yaml"):
        assert read_definition(word).name == "demo"
    (tmp_path / "demo").write_text("name: mine\naxes: {objective: [dpo]}")
    assert read_definition("demo").name == "mine"
    with pytest.raises(
        UserError, match="demoo: No such file or directory; give a sweep file, or the name of"
    ):
        read_definition("demoo")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="exists, is not empty and is no sweep folder"):
        make(tmp_path)
    assert list(contents(tmp_path / "out")) == ["thesis.tex"]


def test_freezing_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    sweep, cells = make(tmp_path)
    sweep.manifest.unlink()
    sweep.run(cells[1].cell).run_json.unlink()
    make(tmp_path)
    assert sweep.run(cells[1].cell).read_run()["status"] == "pending"


def test_a_manifest_that_is_lost_does_not_cost_what_has_run(tmp_path: Path) -> None:
    sweep, cells = make(tmp_path)
    sweep.run(cells[0].cell).metrics.write_text('{"step": 1}\n')
    sweep.manifest.unlink()
    with pytest.raises(UserError, match=r"has lost its manifest.jsonl, and dpo-off has run"):
        make(tmp_path)
    assert sweep.run(cells[0].cell).metrics.is_file()


def test_what_is_wrong_with_a_cell_names_the_cell_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cell dpo-off: objective.betta: .*did you mean objective.beta\?"):
        make(
            tmp_path,
            GRID.replace("[dpo]", "[{label: dpo, overrides: [objective=dpo, objective.betta=1]}]"),
        )
    assert contents(tmp_path / "out") == {}


def test_a_damaged_manifest_names_its_line(tmp_path: Path) -> None:
    sweep, _ = make(tmp_path)
    sweep.manifest.write_text(sweep.manifest.read_text() + '{"name": "x"}\n')
    with pytest.raises(UserError, match=r"manifest.jsonl: line 3 is damaged"):
        sweep.read_cells()


def test_a_cell_that_starts_under_other_code_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, cells = make(tmp_path)
    run = sweep.run(cells[0].cell)
    run.reopen()
    assert capsys.readouterr().err == ""
    assert (run.read_run()["status"], run.read_run()["num_resumed"]) == ("running", 0)
    monkeypatch.setattr(rcpo.runs.folder, "code_hash", lambda: "0123456789abcdef")
    run.reopen()
    assert "rcpo's code has changed since this run was made" in capsys.readouterr().err
    run.reopen()
    assert capsys.readouterr().err == ""
    (change,) = run.read_run()["code_changes"]
    assert change["source_hash"] == "0123456789abcdef"
    assert run.read_run()["source_hash"] == code_hash()
    assert run.read_run()["num_resumed"] == 2


def some_of(name: str, folder: Path, step: int) -> tuple[Definition, list[FrozenCell]]:
    """A shipped sweep, and every step-th of its cells: composing one takes a tenth of a second."""
    definition = read_definition(str(ROOT / "sweeps" / name))
    sweep = SweepFolder(folder)
    return definition, [freeze_cell(point, definition, sweep, Here()) for point in expand(definition)[::step]]


@pytest.mark.ci("the papers' grids")
@pytest.mark.parametrize("model", ["pythia", "mistral", "qwen"])
def test_the_papers_grids_compose_with_the_published_settings(tmp_path: Path, model: str) -> None:
    """32 pairs a step, constant rate, one epoch, 1024 tokens of which 512 of prompt, seed 42, EMA 0.98."""
    definition, averaged = some_of(f"paper_{model}.yaml", tmp_path, 4)
    own, summed = some_of(f"paper_{model}_summed.yaml", tmp_path, 3)
    for frozen in averaged + summed:
        train = frozen.config.train
        assert (train.pairs_per_step, train.epochs, train.max_length, train.max_prompt_length) == (
            32, 1.0, 1024, 512,
        )  # fmt: skip
        assert (frozen.config.optim.schedule, frozen.config.optim.warmup_steps) == ("constant", 0)
        assert (frozen.config.seed, frozen.config.calibration.ema_beta) == (42, 0.98)
        assert frozen.config.data.path in definition.estimate.train_pairs
    betas = {
        frozen.config.objective["beta"] for frozen in averaged if frozen.config.objective["name"] == "dpo"
    }
    assert betas == {1.0 if model == "pythia" else 2.0}
    rates = {(frozen.config.model.lora.rank, frozen.config.optim.lr) for frozen in averaged + summed}
    wanted = {"pythia": {(None, 6e-7), (16, 1e-4)}, "mistral": {(8, 3e-7)}, "qwen": {(8, 5e-7)}}
    assert rates == wanted[model]
    for grid in (definition, own):
        assert [value.label for value in grid.axes["objective"]] == ["dpo", "ipo", "simpo", "cpo", "slic"]
    assert {value.label for value in definition.axes["calibration"]} == {"off", "published", "on"}
    for frozen in averaged:
        config = frozen.config
        assert config.objective_function.averages
        adapts = config.model.lora.rank is not None
        assert config.calibration.scope == ("lora_last" if adapts else "head")
    assert not any(frozen.config.objective_function.averages for frozen in summed)


def test_the_demo_is_the_grid_of_the_readme(tmp_path: Path) -> None:
    definition, frozen = some_of("demo.yaml", tmp_path, 31)
    assert [len(values) for values in definition.axes.values()] == [6, 5, 3]
    assert [cell.cell.name for cell in frozen] == ["dpo-off-seed0", "ipo-off-seed1", "dil_bce-off-seed2"]


def test_the_manifest_is_one_json_object_a_line(tmp_path: Path) -> None:
    sweep, _ = make(tmp_path)
    first = json.loads(sweep.manifest.read_text().splitlines()[0])
    assert first["axes"] == {"objective": "dpo", "calibration": "off"}
    assert first["words"][-2:] == ["objective=dpo", "calibration=off"]
    assert RunFolder(sweep.cells / first["name"]).config.is_file()
