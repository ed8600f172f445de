"""`rcpo resume --allow-change`: what may differ from the config a run was started with, and what comes of
it."""

import json
from pathlib import Path

import pytest
import yaml

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from rcpo.common.errors import UserError
from rcpo.launch.changes import changed_config
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run

CASE = Case("dpo", "on", "llama-tied", "adamw")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    write_inputs(tmp_path)
    return make_run(make_config(tmp_path, tmp_path / "run", CASE, Layout(1, 8)))


def edit(run: RunFolder, key: str, value: object) -> None:
    """As a user does in an editor."""
    tree = yaml.safe_load(run.config.read_text())
    *groups, last = key.split(".")
    place = tree
    for group in groups:
        place = place[group]
    place[last] = value
    run.config.write_text(yaml.safe_dump(tree))


def test_an_edited_config_is_refused_with_what_differs(run: RunFolder) -> None:
    """optim.lr decides what is trained: put back or start anew, also when named; nothing is written."""
    edit(run, "optim.lr", 0.5)
    before = run.config.read_bytes()
    with pytest.raises(UserError) as caught:
        changed_config(run, [], None)
    assert str(caught.value) == (
        f"optim.lr: the run was started with 0.003, not 0.5, and it decides what is trained; put it back in "
        f"{run.config}, or start a new run"
    )
    with pytest.raises(UserError, match=r"optim\.lr decides what is trained, so it cannot change"):
        changed_config(run, ["optim.lr"], None)
    assert run.config.read_bytes() == before


def test_a_safe_edit_wants_to_be_named(run: RunFolder) -> None:
    """train.save_every: refused with the words to type, then taken, remembered, and no change any more."""
    edit(run, "train.save_every", 7)
    with pytest.raises(UserError) as caught:
        changed_config(run, [], None)
    assert str(caught.value) == (
        f"train.save_every: the run was started with 0, and {run.config} says 7; put it back, or type "
        f"rcpo resume {run.path} --allow-change train.save_every"
    )
    changed = changed_config(run, ["train.save_every"], None)
    changed.write(run)
    assert changed.config.train.save_every == 7
    (change,) = run.read_run()["changes"]
    assert (change["key"], change["from"], change["to"]) == ("train.save_every", 0, 7)
    assert changed_config(run, [], None).config.train.save_every == 7


def test_a_value_on_the_command_line_is_written_to_the_config(run: RunFolder) -> None:
    """KEY=VALUE, for several keys at once; a null too."""
    allowed = ["train.steps=9", "tracking.project=elsewhere", "train.keep_last=null"]
    changed_config(run, allowed, None).write(run)
    _, config = open_run(str(run.path))
    assert (config.train.steps, config.tracking.project, config.train.keep_last) == (9, "elsewhere", None)
    assert {change["key"] for change in run.read_run()["changes"]} == {"train.steps", "tracking.project"}


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        ("train.stepz=9", "train.stepz is no key of the run's config; did you mean train.steps?"),
        ("train=9", "train is no key of the run's config"),
        ("train.steps=-1", "train.steps=-1: must be greater than 0"),
        ("train.steps=[", "[ is no value; type train.steps=VALUE"),
        ("objective.beta=1", "objective.beta decides what is trained, so it cannot change"),
        ("train.pairs_per_device=3", "pairs_per_device=3"),
        ("launch.processes=3", "3"),
    ],
)
def test_a_change_that_cannot_be_is_one_line(run: RunFolder, allowed: str, said: str) -> None:
    before = run.config.read_bytes(), run.run_json.read_bytes()
    with pytest.raises(UserError) as caught:
        changed_config(run, [allowed], None)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (run.config.read_bytes(), run.run_json.read_bytes()) == before


def test_steps_cannot_change_under_a_schedule_that_they_decide(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    run = make_run(make_config(tmp_path, tmp_path / "run", CASE, Layout(1, 8), "optim.schedule=linear"))
    with pytest.raises(UserError, match=r"with optim\.schedule=linear it decides the learning rate"):
        changed_config(run, ["train.steps=9"], None)


@pytest.mark.parametrize(
    ("state", "allowed", "said"),
    [
        (
            (1, 2),
            "deepspeed.stage=3",
            "DeepSpeed cannot turn that into 1 at ZeRO 3; resume with deepspeed.stage=2",
        ),
        ((1, 0), "deepspeed.stage=1", "cannot turn that into 1 at ZeRO 1; resume with deepspeed.stage=0"),
        ((1, 1), "train.steps=3", "train.steps=3: the newest checkpoint is of step 4 already"),
    ],
)
def test_what_the_newest_checkpoint_cannot_do_is_refused_before_anything_is_written(
    tmp_path: Path, state: tuple[int, int], allowed: str, said: str
) -> None:
    write_inputs(tmp_path)
    run = make_run(make_config(tmp_path, tmp_path / "run", CASE, Layout(1, 8, state[1])))
    newest = run.checkpoints / "step-000004"
    newest.mkdir()
    (newest / "state.json").write_text(json.dumps({"world_size": state[0], "stage": state[1]}))
    (newest / "manifest.json").write_text("{}")
    before = run.config.read_bytes()
    with pytest.raises(UserError) as caught:
        changed_config(run, [allowed], None)
    assert said in str(caught.value)
    assert run.config.read_bytes() == before


def test_only_adamw_goes_on_with_other_ranks(tmp_path: Path) -> None:
    """DeepSpeed's converter looks for AdamW's moments."""
    write_inputs(tmp_path)
    case = Case("dpo", "on", "llama-tied", "sgd")
    run = make_run(make_config(tmp_path, tmp_path / "run", case, Layout(2, 4, 2)))
    newest = run.checkpoints / "step-000004"
    newest.mkdir()
    (newest / "state.json").write_text(json.dumps({"world_size": 2, "stage": 2}))
    (newest / "manifest.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        changed_config(run, ["launch.processes=1"], None)
    assert str(caught.value).endswith(
        "was written by 2 ranks at ZeRO 2 with optim=sgd, and DeepSpeed shares out AdamW's state alone anew; "
        "resume on 2 ranks with deepspeed.stage=2"
    )
