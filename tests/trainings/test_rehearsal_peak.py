"""The rehearsal takes as much memory as the steps that follow: all that torch allocates, counted."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helpers.cases import RELEASING, Case, Layout, make_config, make_run, write_inputs
from helpers.forked import in_a_fork
from helpers.rank_runs import train_here
from helpers.selection import matrix
from rcpo.runs.folder import RunFolder

NUM_STEPS = 3
KINDS = [
    ("off", 1, ()),
    ("on", 1, ()),
    ("on", 2, ()),
    ("exact", 1, ("calibration.every=2", "calibration.warmup_steps=1")),
    ("exact", 3, ("calibration.every=2", "calibration.warmup_steps=1")),
    ("on", 1, ("model.dtype=bfloat16",)),
    ("exact", 2, ("model.dtype=bfloat16",)),
    ("on", 1, ("train.packing=true", "train.share_prefix=true", "model.attention=sdpa")),
    ("on", 1, ("model.lora.rank=3",)),
    ("published", 1, ()),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize(("calibration", "stage", "words"), matrix(KINDS, KINDS[1].__eq__, "peaks of memory"))
def test_peak(inputs: Path, tmp_path: Path, calibration: str, stage: int, words: tuple[str, ...]) -> None:
    """Within 5 % of that of three steps, the largest micro-batch among them, whatever is measured; 10 % where
    the sides go apart: from 1 % above to 8.5 % below was seen there from run to run, and not explained."""
    case = Case("dpo", calibration, "llama", "adamw")
    released = ", ".join(f"{key}: 0" for key in RELEASING) if stage == 3 else ""
    own = (
        f"train.steps={NUM_STEPS}", "train.eval_every=0", f"deepspeed.stage={stage}",
        f"deepspeed.extra={{zero_optimization: {{{released}}}}}", *words,
    )  # fmt: skip
    run = make_run(make_config(inputs, tmp_path / "run", case, Layout(1, 4), *own))
    in_a_fork(lambda: compare_peaks(run, 0.1 if calibration == "exact" else 0.05))


def compare_peaks(run: RunFolder, tolerance: float) -> None:
    import rcpo.training.loop

    rehearse, finish = rcpo.training.loop.rehearse, rcpo.training.loop._finish

    def marked_rehearse(*args: object) -> None:
        with torch.profiler.record_function("rehearsal"):
            rehearse(*args)  # type: ignore[arg-type]

    def marked_finish(*args: object) -> dict[str, object]:
        with torch.profiler.record_function("end"):
            return {}

    rcpo.training.loop.rehearse = marked_rehearse
    rcpo.training.loop._finish = marked_finish  # type: ignore[assignment]
    assert finish
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_here(run)
    in_rehearsal, in_steps = peaks(profiler)
    assert in_rehearsal == pytest.approx(in_steps, rel=tolerance), f"{in_rehearsal} and {in_steps} bytes"


def peaks(profiler: profile) -> tuple[int, int]:
    """The most bytes at a time, since the profile's start: while the rehearsal ran, and in the steps after
    it."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (rehearsal,) = (event for event in events if event.name() == "rehearsal")
    (end,) = (event for event in events if event.name() == "end")
    rehearsed = rehearsal.start_ns() + rehearsal.duration_ns()
    held, in_rehearsal, in_steps = 0, 0, 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            if rehearsal.start_ns() <= event.start_ns() <= rehearsed:
                in_rehearsal = max(in_rehearsal, held)
            elif rehearsed < event.start_ns() < end.start_ns():
                in_steps = max(in_steps, held)
    return in_rehearsal, in_steps
