"""`rcpo resume --allow-change`: a run that goes on with other ranks or at another ZeRO stage.
`tests/runs/test_changes.py` has what may change."""

from pathlib import Path

import pytest

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import Job, do_jobs
from helpers.same_run import assert_equal_rows, final_weights
from helpers.same_run import metrics as rows_of
from helpers.selection import matrix
from rcpo.launch.changes import changed_config

pytestmark = pytest.mark.ci("kills and resumes")

CASE = Case("dpo", "on", "llama-tied", "adamw")
SPREADINGS = [
    (Layout(2, 2, 2), ("launch.processes=1",)),
    (Layout(1, 2, 1), ("launch.processes=2", "deepspeed.stage=2")),
    (Layout(2, 2, 3), ("launch.processes=1", "train.pairs_per_device=4")),
    (Layout(1, 2, 3), ("launch.processes=2",)),
    (Layout(2, 2, 0), ("launch.processes=1",)),
]
"""Layout of the run that is killed after step 5, and how it is resumed from step 4."""


ADAPTER = ("model.lora.rank=3", "calibration.scope=head")
ROWS = [(*spreading, words) for words in ((), ADAPTER) for spreading in SPREADINGS]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "allowed", "model"), matrix(ROWS, ROWS[:2].__contains__, "kills and resumes"), ids=str
)
def test_other_ranks_and_stages_resume_to_rounding(
    tmp_path: Path, layout: Layout, allowed: tuple[str, ...], model: tuple[str, ...]
) -> None:
    """Rows, alpha and weights equal those of the run that was never killed, to fp32 tolerance; the schedule
    goes on where it was. With an adapter too, whose checkpoints are without its base."""
    write_inputs(tmp_path)
    words = ("train.save_every=2", "optim.schedule=cosine", *model)
    whole, cut = (
        make_run(make_config(tmp_path, tmp_path / name, CASE, layout, *words)) for name in ("whole", "cut")
    )
    do_jobs([Job(str(whole.path)), Job(str(cut.path), killed_at=("row", 5))], layout.ranks, 300)
    changed = changed_config(cut, allowed, None)
    changed.write(cut)
    do_jobs([Job(str(cut.path), resume=True)], changed.config.world_size(), 300)
    assert_equal_rows(rows_of(whole), rows_of(cut))
    expected = final_weights(whole)
    for name, weight in final_weights(cut).items():
        assert float((weight - expected[name]).abs().max()) < 1e-6, name
    assert {change["key"] for change in cut.read_run()["changes"]} == {
        word.partition("=")[0] for word in allowed
    }
