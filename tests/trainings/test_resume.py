"""Invariant 8: a run that was killed and resumed is the run that was never killed, line for line and bit for
bit.

Also what a resume says about damaged files. Killed means SIGKILL of rank 0 at a chosen moment.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rcpo.launch.start
import rcpo.training.checkpoint
from helpers import forked
from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import Job, Moment, do_jobs
from helpers.same_run import final_weights, metrics
from helpers.selection import asked_for, matrix
from rcpo.common.errors import UserError
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.training.read_inputs import read_inputs

CASE = Case("dpo", "on", "llama-tied", "adamw")
EXACT = Case("dpo", "exact", "llama", "adamw")
FEEDBACK = Case("simpo", "feedback", "llama-tied", "adamw")
BALANCE = Case("dpo", "balance", "neox-tied", "adamw")
PUBLISHED = Case("cpo", "published", "neox", "adamw")
POPULATION = Case("simpo", "exact", "llama", "adamw")
POPULATION_HEAD = Case("ipo", "on", "neox", "adamw")
MISMATCHED = Case("kto", "on", "neox", "adamw")
LENGTHS_OF_STEP = Case("acpo", "on", "llama", "adamw")
LENGTHS_BEFORE = Case("acpo", "exact", "neox", "adamw")
WORDS = {
    # Measured at steps 1, 3 and 5: the run resumes from step 4 between two measurements.
    EXACT: ("calibration.every=2", "calibration.warmup_steps=0"),
    # On batches in steps 1 and 2, on the probe in 3 and 5: the run resumes between those two.
    FEEDBACK: ("calibration.feedback.every=2", "calibration.feedback.low=-1"),
    BALANCE: ("calibration.balance.every=3",),
    # The row after the checkpoint has products with the measurement before it.
    POPULATION: ("metrics.population=true",),
    POPULATION_HEAD: ("metrics.population=true",),
    MISMATCHED: ("objective.kl=mismatched",),
    LENGTHS_OF_STEP: ("objective.tau=batch", "objective.delta=0.1"),
    LENGTHS_BEFORE: ("objective.tau=previous", "objective.delta=0.1", "objective.risen=formula"),
}
"""Further overrides."""
LAYOUTS = (*(Layout(1, 4, stage) for stage in (0, 1, 2, 3)), Layout(2, 2, 2), Layout(2, 2, 3))
AFTER_A_CHECKPOINT: tuple[Moment, int] = ("row", 5)
MOMENTS: list[tuple[Case, Layout, tuple[Moment, int]]] = [
    *((CASE, layout, AFTER_A_CHECKPOINT) for layout in LAYOUTS),
    (CASE, Layout(1, 4, 1), ("row", 1)),  # before any checkpoint: starts again
    (CASE, Layout(1, 4, 1), ("row", 4)),  # after the row, before its checkpoint and evaluation
    (CASE, Layout(1, 4, 1), ("checkpoint", 4)),  # half-written: the one of step 2 is used
    (CASE, Layout(1, 4, 1), ("export", 6)),  # the model is written, but not yet in its place
    (Case("simpo", "off", "neox", "sgd"), Layout(1, 4, 1), AFTER_A_CHECKPOINT),
    (Case("bco", "on", "neox", "adamw"), Layout(1, 4, 1), AFTER_A_CHECKPOINT),  # has batch statistics
    (EXACT, Layout(1, 4, 1), AFTER_A_CHECKPOINT),
    (EXACT, Layout(2, 2, 3), AFTER_A_CHECKPOINT),
    (FEEDBACK, Layout(1, 4, 1), AFTER_A_CHECKPOINT),
    (FEEDBACK, Layout(2, 2, 2), AFTER_A_CHECKPOINT),
    (BALANCE, Layout(1, 4, 1), AFTER_A_CHECKPOINT),
    (BALANCE, Layout(2, 2, 3), AFTER_A_CHECKPOINT),
    (PUBLISHED, Layout(2, 2, 2), AFTER_A_CHECKPOINT),  # each rank has a state of its own
    *((CASE, layout, ("signal", 4)) for layout in LAYOUTS[1:]),  # stops after step 5, between two checkpoints
    *((CASE, layout, ("nan", 5)) for layout in LAYOUTS),  # the step is repeated, with its number this time
    (POPULATION, Layout(1, 4, 1), ("signal", 4)),
    (POPULATION, Layout(2, 2, 3), ("signal", 4)),
    (POPULATION_HEAD, Layout(2, 2, 2), ("signal", 4)),
    (MISMATCHED, Layout(1, 4, 1), AFTER_A_CHECKPOINT),
    (MISMATCHED, Layout(2, 2, 3), ("signal", 2)),
    (MISMATCHED, Layout(2, 2, 2), ("nan", 5)),
    (LENGTHS_OF_STEP, Layout(2, 2, 2), AFTER_A_CHECKPOINT),
    (LENGTHS_BEFORE, Layout(1, 4, 1), AFTER_A_CHECKPOINT),
    (Case("kto", "off", "llama", "adamw"), Layout(1, 4, 1), ("signal", 2)),  # next comes a second pass's pair
]
"""Checkpoints are written at steps 2, 4 and 6, evaluations at 0, 4 and 6."""


ALWAYS = {
    MOMENTS[1],  # which the tests of damaged files copy
    (CASE, Layout(1, 4, 0), ("row", 5)),
    (CASE, Layout(1, 4, 1), ("checkpoint", 4)),
    (CASE, Layout(1, 4, 1), ("export", 6)),
    (CASE, Layout(1, 4, 3), ("row", 5)),
    (CASE, Layout(1, 4, 2), ("nan", 5)),
    (EXACT, Layout(1, 4, 1), ("row", 5)),
    (FEEDBACK, Layout(2, 2, 2), ("row", 5)),
    (BALANCE, Layout(1, 4, 1), ("row", 5)),
    (PUBLISHED, Layout(2, 2, 2), ("row", 5)),
    (POPULATION, Layout(1, 4, 1), ("signal", 4)),
    (Case("bco", "on", "neox", "adamw"), Layout(1, 4, 1), ("row", 5)),
    (Case("simpo", "off", "neox", "sgd"), Layout(1, 4, 1), ("row", 5)),
}
"""One of every kind: ZeRO 0 to 3, two ranks, every calibration that steers, batch statistics, moments."""


def name_of(case: Case, layout: Layout, moment: tuple[Moment, int] | None) -> str:
    return f"{case}-{layout}-" + ("whole" if moment is None else f"{moment[0]}{moment[1]}")


def selected(request: pytest.FixtureRequest) -> list[tuple[Case, Layout, tuple[Moment, int]]]:
    """Rows of MOMENTS that run in this session, and those that the tests below need."""
    rows = {
        (params["case"], params["layout"], params["moment"])
        for params in asked_for(request)
        if "moment" in params
    }
    return [row for row in MOMENTS if row in rows | ALWAYS]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """By name: each case never killed, and killed and resumed, by one launch of one rank and one of two."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    folder = tmp_path_factory.mktemp("runs")
    jobs: dict[str, list[Job]] = {}
    runs = {}
    ranks_of = {}
    for case, layout, moment in selected(request):
        for at in (None, moment):
            name = name_of(case, layout, at)
            if name in runs:
                continue
            config = make_config(
                inputs, folder / name, case, layout, "train.save_every=2", "optim.schedule=cosine",
                "optim.warmup_steps=2", *WORDS.get(case, ()),
            )  # fmt: skip
            runs[name], ranks_of[name] = make_run(config), layout.ranks
            path = str(runs[name].path)
            jobs[name] = [Job(path)] if at is None else [Job(path, killed_at=at), Job(path, resume=True)]
    for num_ranks in (1, 2):
        do_jobs([job for name in jobs if ranks_of[name] == num_ranks for job in jobs[name]], num_ranks, 400)
    return runs


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("case", "layout", "moment"), matrix(MOMENTS, ALWAYS.__contains__, "kills and resumes"), ids=str
)
def test_killed_and_resumed_equals_never_killed(
    case: Case, layout: Layout, moment: tuple[Moment, int], runs: dict[str, RunFolder]
) -> None:
    """metrics.jsonl but for speed, eval.jsonl, per-pair results and final weights: the same bits."""
    whole, resumed = runs[name_of(case, layout, None)], runs[name_of(case, layout, moment)]
    assert [row["step"] for row in metrics(whole)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in whole.rows(whole.eval)] == [0, 4, 6]
    assert repr(metrics(resumed)) == repr(metrics(whole))  # repr: nan equals nan
    assert resumed.eval.read_bytes() == whole.eval.read_bytes()
    expected = final_weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in final_weights(resumed).items())
    for results in whole.pair_results.iterdir():
        assert (resumed.pair_results / results.name).read_bytes() == results.read_bytes()
    stopped_at = {"signal": moment[1] + 1, "nan": moment[1] - 1}.get(moment[0], 2)
    assert [path.name for path in sorted(resumed.checkpoints.iterdir())] == [
        f"step-{step:06d}" for step in sorted({2, 4, 6, stopped_at})
    ]
    if moment[0] == "nan":
        (lost,) = resumed.read_run()["nonfinite"]
        config = open_run(str(resumed.path))[1]
        inputs = read_inputs(config)
        place = moment[1] - 1, layout.ranks - 1, layout.ranks, layout.pairs_per_device
        *_, last = inputs.sampler(config).micro_batches(*place)
        assert (lost["step"], lost["rank"]) == (moment[1], layout.ranks - 1)
        assert lost["rows"] == [inputs.train[idx].row for idx in last]
        assert len(lost["rows"]) == layout.pairs_per_device


def test_the_row_after_a_resume_has_its_products_with_the_measurements_before(
    request: pytest.FixtureRequest, runs: dict[str, RunFolder]
) -> None:
    """Every row but the first has population/*, the one after the checkpoint too."""
    for case, layout, moment in selected(request):
        if "metrics.population=true" in WORDS.get(case, ()):
            rows = metrics(runs[name_of(case, layout, moment)])
            assert ["population/cosine" in row for row in rows] == [False, *[True] * 5]


@pytest.fixture
def damaged(runs: dict[str, RunFolder], tmp_path: Path) -> RunFolder:
    """A copy of a run that was resumed, for a test to damage."""
    shutil.copytree(runs[name_of(*MOMENTS[1])].path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    run.update_run(status="failed")
    return run


def resume_as_rank(run: RunFolder) -> subprocess.CompletedProcess[str]:
    return forked.rcpo("resume", run.path, cwd=run.path.parent, env=os.environ | {"CI": "1"})


@pytest.mark.timeout(900)
def test_the_newest_whole_checkpoint_is_used_and_said(damaged: RunFolder, runs: dict[str, RunFolder]) -> None:
    """One byte of the newest checkpoint's optimizer state changed, and the one before it without its
    manifest: both are named, and the run goes on from step 2 to the rows and weights of the run that was
    never killed."""
    newest = damaged.checkpoints / "step-000006"
    state = next(newest.rglob("*optim_states.pt"))
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    (damaged.checkpoints / "step-000004" / "manifest.json").unlink()
    done = resume_as_rank(damaged)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if str(damaged.checkpoints) in line]
    assert said == [
        f"rcpo: warning: {damaged.checkpoints / 'step-000004'}: has no manifest.json, so it is not used",
        f"rcpo: warning: {newest}: {state.relative_to(newest)} is missing or damaged; remove this checkpoint "
        "to use the one before it; looking for the one before it",
        f"rcpo: warning: {damaged.checkpoints / 'step-000002'}: is the newest whole checkpoint, and the run "
        "goes on from there",
    ]
    whole = runs[name_of(CASE, LAYOUTS[1], None)]
    assert repr(metrics(damaged)) == repr(metrics(whole))
    expected = final_weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in final_weights(damaged).items())
    rcpo.training.checkpoint.check_manifest(newest)


@pytest.mark.timeout(200)
def test_a_run_whose_checkpoints_are_all_damaged_is_refused(damaged: RunFolder) -> None:
    """Nothing is thrown away and nothing starts again by itself: exit code 2 and one line."""
    for state in damaged.checkpoints.rglob("state.json"):
        cut(state)
    rows = damaged.metrics.read_bytes()
    done = resume_as_rank(damaged)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == (
        f"rcpo: {damaged.checkpoints}: none of its 3 checkpoints is whole; remove them to start again from "
        "the first step"
    )
    assert damaged.metrics.read_bytes() == rows


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def break_second_line(path: Path) -> None:
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:25], *lines[2:]]))


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("run.json", cut, "is damaged; remove it to go on"),
        ("run.json", not_utf8, "is damaged; remove it to go on"),
        ("metrics.jsonl", break_second_line, "line 2 is damaged; mend it or remove it"),
        ("eval.jsonl", break_second_line, "line 2 is damaged; mend it or remove it"),
        ("metrics.jsonl", not_utf8, "line 1 is damaged; mend it or remove it"),
        ("config.yaml", lambda path: path.write_text("a: [1"), "is not YAML"),
        ("config.yaml", lambda path: path.write_text("a: 1"), "a: no such key"),
    ],
)
def test_damaged_small_file_is_one_line_before_anything_starts(
    damaged: RunFolder, name: str, damage: Callable[[Path], object], said: str
) -> None:
    damage(damaged.path / name)
    before = {path: path.read_bytes() for path in damaged.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        rcpo.launch.start.resume(str(damaged.path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in damaged.path.rglob("*") if path.is_file()} == before
