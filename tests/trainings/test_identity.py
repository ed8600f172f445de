"""A run that goes on trains on what it was started with, by content: pairs, order, weights, reference."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.cases import Case, Layout, make_config, write_inputs
from helpers.forked import in_a_fork
from helpers.tiny_models import make_llama, make_neox
from rcpo.common.errors import UserError
from rcpo.launch import start
from rcpo.runs.folder import RunFolder

Rows = list[dict[str, Any]]


def swapped(rows: Rows) -> Rows:
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


EDITS: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "swapped": (swapped, "the 20 training pairs have other tokens, weights or another order"),
    "reversed": (
        lambda rows: rows[::-1],
        "the 20 training pairs have other tokens, weights or another order",
    ),
    "removed": (lambda rows: rows[:-3], "there are 17 training pairs, there were 20"),
    "appended": (
        lambda rows: [*rows, {"prompt": "w9", "chosen": " w8", "rejected": " w7"}],
        "there are 21 training pairs, there were 20",
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def trained(inputs: Path, run_dir: Path, *words: str) -> RunFolder:
    """A run of two steps that can go on."""
    case = Case("dpo", "off", "llama", "sgd")
    config = make_config(
        inputs,
        run_dir,
        case,
        Layout(1, 8),
        "train.steps=2",
        "train.save_every=1",
        "train.eval_every=0",
        *words,
    )

    def work() -> None:
        assert start.start(lambda: config) == 0

    in_a_fork(work)
    return RunFolder(run_dir)


def refused(run: RunFolder) -> str:
    """What going on is refused with; nothing of the run has changed."""
    before = {path: path.read_bytes() for path in run.path.glob("*.*") if path.is_file()}

    def work() -> None:
        with pytest.raises(UserError) as caught:
            start.resume(str(run.path), ["train.steps=4"])
        (run.path.parent / "said").write_text(str(caught.value))

    in_a_fork(work)
    assert {path: path.read_bytes() for path in run.path.glob("*.*") if path.is_file()} == before
    return (run.path.parent / "said").read_text()


@pytest.mark.parametrize("words", [(), ("reference.name=live",)], ids=["cached", "live"])
def test_other_data_under_the_old_path_are_refused(
    inputs: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Edited one way after the other; with the old content back the run goes on."""
    data = tmp_path / "data.jsonl"
    data.write_bytes((inputs / "train.jsonl").read_bytes())
    run = trained(inputs, tmp_path / "run", f"data.path={data}", *words)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for edit, said in EDITS.values():
        data.write_text("".join(json.dumps(row) + "\n" for row in edit(rows)))
        assert said in refused(run)
    data.write_bytes((inputs / "train.jsonl").read_bytes())

    def work() -> None:
        assert start.resume(str(run.path), ["train.steps=4"]) == 0

    in_a_fork(work)
    assert len(run.rows(run.metrics)) == 4


@pytest.mark.parametrize("by", ["path", "mix"])
def test_several_files_are_trained_on_as_one_and_known_by_all(inputs: Path, tmp_path: Path, by: str) -> None:
    """The 20 pairs in two files that a glob or a mixture names: the run resumes; one more row in a file, and
    one more file, are refused."""
    lines = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:10]), ("b", lines[10:])):
        (tmp_path / f"part-{name}.jsonl").write_text("".join(part))
    glob = f"data.path={tmp_path}/part-*.jsonl"
    mix = f"data.mix={{{tmp_path}/part-a.jsonl:1,{tmp_path}/part-b.jsonl:1}}"
    words = [glob] if by == "path" else ["data.path=null", mix]
    run = trained(inputs, tmp_path / "run", *words)
    whole = trained(inputs, tmp_path / "whole")
    assert run.read_run()["inputs"] == whole.read_run()["inputs"]
    losses = [[row["train/loss"] for row in each.rows(each.metrics)] for each in (run, whole)]
    assert losses[0] == losses[1]

    def work() -> None:
        assert start.resume(str(run.path), ["train.steps=4"]) == 0

    in_a_fork(work)
    assert len(run.rows(run.metrics)) == 4
    if by == "path":
        (tmp_path / "part-c.jsonl").write_text(lines[0])
        assert "there are 21 training pairs, there were 20" in refused(run)
    else:
        (tmp_path / "part-b.jsonl").write_text("".join(lines[11:]))
        assert "there are 18 training pairs, there were 20" in refused(run)


def test_other_held_out_pairs_are_refused(inputs: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_bytes((inputs / "held-out.jsonl").read_bytes())
    run = trained(inputs, tmp_path / "run", f"data.eval_path={held_out}")
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in swapped(rows)))
    assert "the 6 held-out pairs have other tokens, weights or another order" in refused(run)


@pytest.mark.parametrize("own", ["model.path", "reference.path"])
@pytest.mark.parametrize("name", ["cached", "live"])
def test_other_weights_under_the_old_path_are_refused(
    inputs: Path, tmp_path: Path, own: str, name: str
) -> None:
    place = tmp_path / "weights"
    make_llama(seed=3).save_pretrained(place)
    AutoTokenizer.from_pretrained(inputs / "llama").save_pretrained(place)
    run = trained(inputs, tmp_path / "run", f"{own}={place}", f"reference.name={name}")
    make_neox(seed=4).save_pretrained(place)
    said = refused(run)
    assert f"the weights at {own} are others" in said
