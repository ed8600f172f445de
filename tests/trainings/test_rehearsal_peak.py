"""The rehearsal takes as much memory as the steps that follow: all that torch allocates, counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
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
    """Within 5 % of that of three steps, the largest micro-batch among them, whatever is measured. Of `exact`
    1 % above was seen at ZeRO 1 and 3, and 3.9 % above in bf16 at 2, where every step is measured; not
    explained, perhaps by the ordinary step, which is rehearsed too."""
    case = Case("dpo", calibration, "llama", "adamw")
    released = ", ".join(f"{key}: 0" for key in RELEASING) if stage == 3 else ""
    own = (
        f"train.steps={NUM_STEPS}", "train.eval_every=0", f"deepspeed.stage={stage}",
        f"deepspeed.extra={{zero_optimization: {{{released}}}}}", *words,
    )  # fmt: skip
    run = make_run(make_config(inputs, tmp_path / "run", case, Layout(1, 4), *own))
    in_a_fork(lambda: compare_peaks(run))


def compare_peaks(run: RunFolder) -> None:
    import rcpo.training.loop

    leave_gloo_s_threads_out()

    rehearse, finish = rcpo.training.loop.rehearse, rcpo.training.loop.finish

    def marked_rehearse(*args: object) -> None:
        with torch.profiler.record_function("rehearsal"):
            rehearse(*args)  # type: ignore[arg-type]

    def marked_finish(*args: object) -> dict[str, object]:
        with torch.profiler.record_function("end"):
            return {}

    rcpo.training.loop.rehearse = marked_rehearse
    rcpo.training.loop.finish = marked_finish  # type: ignore[assignment]
    assert finish
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_here(run)
    in_rehearsal, in_steps = peaks(profiler)
    assert in_rehearsal == pytest.approx(in_steps, rel=0.05), f"{in_rehearsal} and {in_steps} bytes"


def leave_gloo_s_threads_out() -> None:
    """Collectives of one rank, which change nothing, done at once. gloo does them in threads, and where such
    a thread is the last that lets go of a tensor, the profiler sees no end of it: it counts no free of
    another thread. That gloo's threads do so is inferred: from run to run up to three buckets seemed to be
    held to the end, and without its threads the same bytes came out five times of five."""

    def in_place(tensor: Tensor, *args: object, async_op: bool = False, **words: object) -> object:
        return Done() if async_op else None

    def to_output(*args: Any, async_op: bool = False, **words: Any) -> object:
        given = [*args, *(words[name] for name in NAMED if name in words)]
        given[0].copy_(given[1].view(given[0].shape))
        return Done() if async_op else None

    for name in ("all_reduce", "reduce", "broadcast"):
        setattr(torch.distributed, name, in_place)
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(torch.distributed, name, to_output)


NAMED = ("output", "output_tensor", "input", "input_tensor")


class Done:
    """Of a collective that was done at once."""

    def wait(self) -> bool:
        return True


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
