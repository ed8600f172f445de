"""How often a step makes the host wait for the device: once, for the one reduction, however many
micro-batches it has.

The reduction's own read is a `tolist`, which these counts do not see. What else is read on a CPU is on the
host on a GPU too: the gradient's norm, which came with the reduction, and AdamW's count of steps.
"""

from collections import Counter
from pathlib import Path

import pytest

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.forked import in_a_fork
from helpers.rank_runs import draw_nothing
from helpers.selection import matrix
from helpers.waits import Waits
from rcpo.ranks.distributed import initialize, shut_down
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.training.read_inputs import read_inputs

NORM, ADAM_COUNT = "deepspeed/runtime/utils.py", "torch/optim/optimizer.py"
CASE = Case("dpo", "on", "llama", "adamw")
KINDS = [(dtype, stage) for dtype in ("float32", "bfloat16") for stage in (0, 1, 2, 3)]


def readers_of_steps(run: RunFolder) -> list[Counter[str]]:
    """Who reads numbers within each of the run's steps; trains in this process."""
    import rcpo.training.loop as loop

    class Watch(loop.StepWatch):
        def before(self, *_: object) -> None:
            self.waits = Waits()
            self.waits.__enter__()

        def after(self, *_: object) -> None:
            self.waits.__exit__(None, None, None)
            found.append(self.waits.readers)

    found: list[Counter[str]] = []
    device = initialize("cpu")
    draw_nothing()
    try:
        _, config = open_run(str(run.path))
        loop.train(config, run, read_inputs(config), device, False, Watch())
    finally:
        shut_down()
    return found


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("dtype", "stage"), matrix(KINDS, ("float32", 1).__eq__, "rows of matrices"), ids=str
)
def test_a_step_waits_once_however_many_micro_batches_it_has(dtype: str, stage: int, tmp_path: Path) -> None:
    """Eight pairs as 8 micro-batches, measured and clipped: in the last step two looks at the norm on the
    host, and AdamW's counts; neither transformers nor rcpo reads. Before, transformers read in
    every micro-batch, and the norm was on the device: 11 reads in place of 3."""
    write_inputs(tmp_path)
    words = ("train.steps=3", "calibration.every=1", f"model.dtype={dtype}", "model.attention=sdpa")
    run = make_run(make_config(tmp_path, tmp_path / "run", CASE, Layout(1, 1, stage), *words))

    def work() -> None:
        readers = readers_of_steps(run)[-1]  # DeepSpeed's stage 3 reads along in its first two
        assert set(readers) <= {NORM, ADAM_COUNT}, readers
        assert readers[NORM] <= 2, readers

    in_a_fork(work)
