"""Trainings with images over micro-batches, ranks and ZeRO stages, killed and resumed: the same run.

Of two families, tower and projector trained too. Rows have one image, none or two, so that some micro-batches
of some ranks have no image at all.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config, make_run
from helpers.rank_runs import Job, do_jobs, train_all
from helpers.same_run import assert_equal_rows, final_weights, metrics
from helpers.tiny_vision import make_vision, rows_with_images
from rcpo.runs.folder import RunFolder

pytestmark = [pytest.mark.ci("trainings with images"), pytest.mark.timeout(300)]
FAMILIES = ("llava", "idefics3")
WORDS = (
    "model.vision=train", "train.max_length=256", "train.steps=4", "train.save_every=2", "train.eval_every=2",
    "optim.eps=1e-2",
)  # fmt: skip
LAYOUTS = (Layout(1, 4), Layout(1, 1), *(Layout(2, 1, stage) for stage in (0, 1, 2, 3)))
"""The first is what the others must be."""


@pytest.fixture(scope="module", params=FAMILIES)
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp(request.param), request.param)


def write_inputs(folder: Path, family: str) -> Path:
    make_vision(folder / "model", family)
    rows = rows_with_images(folder, 26, (1, 0, 2, 1, 0))
    for name, some in (("train", rows[:20]), ("held-out", rows[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def run_of(inputs: Path, name: str, layout: Layout, *words: str) -> RunFolder:
    case = Case("dpo", "exact", "model", "adamw")
    return make_run(make_config(inputs, inputs / name, case, layout, *WORDS, *words))


def moved(run: RunFolder, inputs: Path) -> set[str]:
    from safetensors.torch import load_file

    start = load_file(inputs / "model" / "model.safetensors")
    return {name for name, weight in final_weights(run).items() if not torch.equal(weight, start[name])}


def test_micro_batches_ranks_and_stages_do_not_matter(inputs: Path) -> None:
    """Every number of every row and evaluation, and weights to 1e-5."""
    assert_same(inputs, LAYOUTS)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_where_positions_follow_the_images_zero_3_is_the_same(family: str, tmp_path: Path) -> None:
    """Two ranks, some of whose micro-batches have no image, over all four steps."""
    assert_same(write_inputs(tmp_path, family), (Layout(1, 4), Layout(2, 1, 3)))


def assert_same(inputs: Path, layouts: Sequence[Layout]) -> None:
    """Runs of all layouts are that of the first, and tower or projector move."""
    runs = [run_of(inputs, f"{layout}", layout) for layout in layouts]
    for num_ranks in (1, 2):
        train_all(
            [run for run, layout in zip(runs, layouts, strict=True) if layout.ranks == num_ranks],
            num_ranks,
            120,
        )
    first, *others = runs
    expected, rows = final_weights(first), metrics(first)
    assert any("vision" in name or "visual" in name for name in moved(first, inputs))
    for run in others:
        assert_equal_rows(rows, metrics(run))
        assert_equal_rows(first.rows(first.eval), run.rows(run.eval))
        for name, weight in final_weights(run).items():
            torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=f"{run.path}: {name}")


KILLS = [
    (Layout(1, 4), ("row", 3)), (Layout(1, 4), ("checkpoint", 4)), (Layout(2, 1, 2), ("row", 3)),
    (Layout(1, 2), ("signal", 1)),
]  # fmt: skip


def test_killed_and_resumed_equals_never_killed(inputs: Path) -> None:
    """SIGKILL after a row and within a checkpoint, and SIGTERM: the same bits."""
    for number, (layout, moment) in enumerate(KILLS):
        whole, killed = (run_of(inputs, f"{which}-{number}", layout) for which in ("whole", "killed"))
        path = str(killed.path)
        jobs = [Job(str(whole.path)), Job(path, killed_at=moment), Job(path, resume=True)]
        do_jobs(jobs, layout.ranks, 120)
        assert [row["step"] for row in metrics(killed)] == [1, 2, 3, 4]
        assert repr(metrics(killed)) == repr(metrics(whole)), (layout, moment)
        assert killed.eval.read_bytes() == whole.eval.read_bytes()
        expected = final_weights(whole)
        for name, weight in final_weights(killed).items():
            assert torch.equal(weight, expected[name]), (layout, moment, name)
