"""Whole runs in joint layouts (prompts shared, sequences packed) and with weights of tokens (ti_dpo).
`tests/data/test_joint.py` has the layouts, `tests/models/test_token_importance.py` the weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import train_all
from helpers.same_run import assert_equal_rows, final_weights
from helpers.same_run import metrics as rows_of


@pytest.mark.timeout(300)
def test_a_run_is_the_same_in_every_layout(tmp_path: Path) -> None:
    """6 steps with `on` and with `exact`, whose measured steps do without: every metric to fp32 tolerance."""
    write_inputs(tmp_path)
    words = {
        "plain": (),
        "shared": ("train.share_prefix=true",),
        "packed": ("train.packing=true", "train.share_prefix=true"),
    }
    runs = {
        (calibration, name): make_run(
            make_config(
                tmp_path, tmp_path / f"{calibration}-{name}", Case("dpo", calibration, "llama", "adamw"),
                Layout(1, 4, 2), "calibration.warmup_steps=0", *more,
            )
        )
        for calibration in ("on", "exact")
        for name, more in words.items()
    }  # fmt: skip
    train_all(list(runs.values()), 1, 200)
    for calibration in ("on", "exact"):
        plain = runs[calibration, "plain"]
        expected = final_weights(plain)
        for layout in ("shared", "packed"):
            joint = runs[calibration, layout]
            assert_equal_rows(rows_of(plain), rows_of(joint))
            for name, weight in final_weights(joint).items():
                torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0)


@pytest.mark.timeout(300)
def test_a_run_weighted_by_tokens_does_not_depend_on_its_split(tmp_path: Path) -> None:
    """8x1 at ZeRO 0, 1x8 with shared prefixes, and 2 ranks at ZeRO 2, with `on`: rows and weights to fp32
    tolerance; the first loss is log 2, as policy and reference are one."""
    write_inputs(tmp_path)
    case = Case("ti_dpo", "on", "llama", "adamw")
    layouts = [(Layout(1, 8, 0), ()), (Layout(1, 1, 1), ("train.share_prefix=true",)), (Layout(2, 2, 2), ())]
    runs = [
        make_run(make_config(tmp_path, tmp_path / str(layout), case, layout, *more))
        for layout, more in layouts
    ]
    train_all(runs[:2], 1, 120)
    train_all(runs[2:], 2, 120)
    rows = rows_of(runs[0])
    assert rows[0]["train/loss"] == pytest.approx(F.softplus(torch.zeros(())).item(), abs=1e-4)
    for run in runs[1:]:
        assert_equal_rows(rows, rows_of(run))
        expected = final_weights(runs[0])
        for name, weight in final_weights(run).items():
            torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0)
