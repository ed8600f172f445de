"""What is one group, what is left out and said to be, and what is compared with what: on run folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.compare_folders import START, make_run
from rcpo.common.errors import UserError
from rcpo.comparison.find import find_runs
from rcpo.comparison.groups import Comparison, compare_runs
from rcpo.comparison.load import load_run
from rcpo.runs.folder import RunFolder


def compare(path: Path) -> Comparison:
    return compare_runs([load_run(run) for run in find_runs([str(path)])])


def labels(comparison: Comparison) -> list[tuple[str, str, int]]:
    """Row label, calibration and number of seeds of each group."""
    return [(group.row_label, group.calibration, len(group.runs)) for group in comparison.groups]


def reasons(comparison: Comparison) -> dict[str, str]:
    return {item.run.path.name: item.reason for item in comparison.left_out}


def test_seeds_are_one_group_and_off_comes_first(tmp_path: Path) -> None:
    for calibration in ("on", "off", "exact"):
        for seed in (0, 1):
            make_run(tmp_path / f"a-{calibration}-{seed}", "dpo", calibration, seed)
    make_run(tmp_path / "b", "ipo", "off")
    assert labels(compare(tmp_path)) == [
        ("dpo", "off", 2), ("dpo", "on", 2), ("dpo", "exact", 2), ("ipo", "off", 1),
    ]  # fmt: skip


def test_what_differs_is_named_where_it_belongs(tmp_path: Path) -> None:
    """Parameters behind the objective and the calibration that have them, the rest where it is not as in
    most groups; what changes no training, and what a calibration does not read, distinguishes nothing."""
    make_run(tmp_path / "a", "dpo", "off")
    make_run(tmp_path / "b", "dpo", "off", settings={"objective.beta": 0.5})
    make_run(tmp_path / "c", "simpo", "on", settings={"calibration.ema_beta": 0.9})
    make_run(tmp_path / "d", "simpo", "on")
    make_run(tmp_path / "e", "simpo", "on", settings={"optim.lr": 0.01})
    make_run(tmp_path / "f", "ipo", "off", settings={"calibration.ema_beta": 0.5})
    quiet = {"metrics.geometry_every": 4, "train.save_every": 10, "tracking.project": "other"}
    make_run(tmp_path / "g", "ipo", "off", seed=1, settings=quiet)
    comparison = compare(tmp_path)
    assert sorted(labels(comparison)) == [
        ("dpo beta=0.1", "off", 1),
        ("dpo beta=0.5", "off", 1),
        ("ipo", "off", 2),
        ("simpo", "on ema_beta=0.9", 1),
        ("simpo", "on ema_beta=0.98", 1),
        ("simpo optim.lr=0.01", "on ema_beta=0.98", 1),
    ]
    assert comparison.usual == {"optim.lr": "null"}
    assert set(comparison.differing) >= {"objective.beta", "calibration.ema_beta", "optim.lr"}
    assert "train.pairs_per_step" in comparison.common


@pytest.mark.parametrize(
    ("places", "said"),
    [(("/a/sft", "/b/base"), ["base", "sft"]), (("/a/sft", "/b/sft"), ["/a/sft", "/b/sft"])],
)
def test_paths_are_named_by_their_last_part_where_that_tells_them_apart(
    tmp_path: Path, places: tuple[str, str], said: list[str]
) -> None:
    """A label with a long path would leave a figure no room."""
    for number, place in enumerate(places):
        make_run(tmp_path / str(number), "dpo", "off", settings={"reference.path": place})
    rows = sorted(label for label, _, _ in labels(compare(tmp_path)))
    assert rows == [f"dpo reference.path={place}" for place in said]


@pytest.mark.parametrize("status", ["running", "pending", "interrupted", "preempted", "failed"])
def test_a_run_that_is_not_done_is_named_with_its_reason(tmp_path: Path, status: str) -> None:
    make_run(tmp_path / "good", seed=0)
    make_run(tmp_path / "bad", seed=1, status=status, exit_reason="step 3:\n  loss is nan")
    comparison = compare(tmp_path)
    assert labels(comparison) == [("dpo", "off", 1)]
    assert reasons(comparison) == {"bad": f"{status}: step 3: loss is nan"}


def _remove(name: str) -> Any:
    def remove(run: RunFolder) -> None:
        path = run.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def _cut_evaluations(run: RunFolder) -> None:
    run.eval.write_text(run.eval.read_text().splitlines(keepends=True)[0])


def _not_finite(run: RunFolder) -> None:
    text = run.eval.read_text()
    row = json.loads(text.splitlines()[-1]) | {"displacement/chosen": None}
    run.eval.write_text(text + json.dumps(row) + "\n")


def _cut_pairs(run: RunFolder) -> None:
    (run.pair_results / "step-000008.safetensors").write_bytes(b"12")


DAMAGES: dict[str, tuple[Any, str]] = {
    "no run.json": (_remove("run.json"), "run.json is missing or damaged"),
    "no evaluations": (_remove("eval.jsonl"), "eval.jsonl holds no evaluation"),
    "one evaluation": (_cut_evaluations, "was evaluated only once"),
    "nan at the end": (_not_finite, "the last evaluation is not finite"),
    "cut metrics": (lambda run: run.metrics.write_text('{"step": 1}\n{"st\n'), "line 2 is damaged"),
    "text in metrics": (lambda run: run.metrics.write_text('{"step": 1, "a": "b"}\n'), "a is not a number"),
    "list in metrics": (lambda run: run.metrics.write_text("[1]\n"), "line 1 is damaged"),
    "cut pairs": (_cut_pairs, "eval/step-000008.safetensors is damaged"),
    "config is a list": (lambda run: run.config.write_text("- a\n"), "config.yaml cannot be read"),
    "config is not yaml": (lambda run: run.config.write_text("a: [\n"), "config.yaml cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_and_the_others_are_compared(tmp_path: Path, damage: str) -> None:
    make_run(tmp_path / "good", seed=0)
    do, reason = DAMAGES[damage]
    do(RunFolder(make_run(tmp_path / "bad", seed=1)))
    comparison = compare(tmp_path)
    assert labels(comparison) == [("dpo", "off", 1)]
    assert list(reasons(comparison)) == ["bad"]
    assert reason in reasons(comparison)["bad"]


def test_runs_of_other_held_out_pairs_or_another_model_are_not_averaged_in(tmp_path: Path) -> None:
    """The config says the same, but the first evaluation does not; rounding is no difference."""
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, start=START + 0.001)
    make_run(tmp_path / "c", seed=2, start=START.flip(1))
    make_run(tmp_path / "d", seed=3, start=START[:, :2], change=((-1.0, 1.0), (-2.0, -2.0)))
    comparison = compare(tmp_path)
    assert labels(comparison) == [("dpo", "off", 2)]
    assert sorted(reasons(comparison)) == ["c", "d"]
    assert "other held-out pairs, or from another model" in reasons(comparison)["c"]


def test_the_same_seed_twice_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=0)
    comparison = compare(tmp_path)
    assert labels(comparison) == [("dpo", "off", 1)]
    assert reasons(comparison) == {"b": f"repeats seed 0 of {tmp_path / 'a'}"}


def test_groups_of_other_data_have_a_row_of_their_own_with_a_note(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "dpo", "off")
    make_run(tmp_path / "b", "dpo", "on")
    make_run(tmp_path / "c", "dpo", "on", settings={"data.seed": 7})
    comparison = compare(tmp_path)
    assert [group.note for group in comparison.groups] == ["", "", "other data or model than most groups"]
    assert [group.baseline is None for group in comparison.groups] == [True, False, True]


def test_a_group_measured_on_other_pairs_than_off_is_not_compared_with_it(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "dpo", "off")
    make_run(tmp_path / "b", "dpo", "on", start=torch.flip(START, [1]))
    group = compare(tmp_path).groups[1]
    assert group.differences == {}
    assert group.note == "other held-out pairs or model than off"


def test_differences_are_paired_by_seed_and_pair(tmp_path: Path) -> None:
    """Chosen of off (-1, 1, 2, -4), of on with seed 0 (0, 1, 2, -1): differences 1, 0, 0, 3; seed 1 has twice
    as much, and seed 5 of on has no partner. Fell: half of off, a quarter of on with seed 0, none with 1."""
    for seed in (0, 1):
        make_run(tmp_path / f"off-{seed}", "dpo", "off", seed)
    rejected = (-2.0, -2.0, -2.0, -2.0)
    make_run(tmp_path / "on-0", "dpo", "on", 0, change=((0.0, 1.0, 2.0, -1.0), rejected))
    make_run(tmp_path / "on-1", "dpo", "on", 1, change=((1.0, 1.0, 2.0, 2.0), rejected))
    make_run(tmp_path / "on-5", "dpo", "on", 5, change=((90.0, 90.0, 90.0, 90.0), rejected))
    group = compare(tmp_path).groups[1]
    found = group.differences["chosen"]
    assert (found.mean, found.num_seeds, found.num_pairs) == (pytest.approx(1.5), 2, 4)
    assert found.se_seeds == pytest.approx(0.5)
    assert group.differences["margin"].mean == pytest.approx(1.5)
    assert group.differences["rejected"].p == 1
    assert group.differences["fell"].mean == pytest.approx((-0.25 - 0.5) / 2)
    assert group.p_holm == found.p


def test_the_baseline_is_the_off_group_of_the_same_training(tmp_path: Path) -> None:
    """Another beta or learning rate is another training; other hardware is not."""
    make_run(tmp_path / "a", "dpo", "off", settings={"objective.beta": 0.5})
    make_run(tmp_path / "b", "dpo", "off", settings={"optim.lr": 0.01})
    make_run(tmp_path / "c", "dpo", "on", settings={"optim.lr": 0.01, "deepspeed.stage": 2})
    make_run(tmp_path / "d", "dpo", "on")
    groups = {group.runs[0].path.name: group for group in compare(tmp_path).groups}
    assert groups["c"].baseline is groups["b"]
    assert groups["d"].baseline is None


def test_without_per_pair_results_there_are_means_but_no_difference(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "dpo", "off")
    make_run(tmp_path / "b", "dpo", "on", with_pairs=False)
    group = compare(tmp_path).groups[1]
    assert (len(group.runs), group.differences, group.note) == (1, {}, "no per-pair results")


def test_runs_are_found_in_folders_sweeps_and_patterns_each_once(tmp_path: Path) -> None:
    """A sweep's cells come in the order of its manifest, new ones last."""
    sweep = tmp_path / "sweep"
    for name in ("a", "b", "z"):
        make_run(sweep / "cells" / name)
    (sweep / "manifest.jsonl").write_text('{"name": "z"}\n{"name": "b"}\n')
    (sweep / "cells" / "not-a-run").mkdir()

    def names(*words: str) -> list[str]:
        return [path.name for path in find_runs(words)]

    assert names(str(sweep)) == ["z", "b", "a"]
    (sweep / "manifest.jsonl").write_text("not json\n")
    assert names(str(sweep)) == names(str(sweep / "cells")) == ["a", "b", "z"]
    assert names(str(sweep / "cells" / "b"), str(sweep), f"{sweep}/cells/[az]*") == ["b", "a", "z"]
    for word, said in {
        str(tmp_path / "none"): "is not there",
        str(tmp_path / "none*"): "matches nothing",
        str(tmp_path): "holds no run folder",
    }.items():
        with pytest.raises(UserError, match=said):
            find_runs([word])


def test_another_held_out_set_of_the_same_size_is_not_the_same(tmp_path: Path) -> None:
    """Equal log-probs at the start, which two sets can have: the digests of their pairs differ."""
    for seed, digest in enumerate(("a", "a", "b")):
        make_run(tmp_path / f"run-{seed}", seed=seed, inputs={"held_out_pairs": digest})
    found = compare(tmp_path)
    assert [len(group.runs) for group in found.groups] == [2]
    assert reasons(found)["run-2"].startswith("measured on other held-out pairs")
