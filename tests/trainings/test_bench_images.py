"""`rcpo bench --images` on a tiny Llava: rcpo, rcpo that encodes every image twice, and TRL do the same work.

Blocks run in forked processes, as in `test_bench`.
"""

from pathlib import Path

import pytest

from helpers.forks import run_forked
from rcpo.bench import plan
from rcpo.bench.images import SPECIAL
from rcpo.bench.plan import run_bench
from rcpo.bench.table import as_json, remarks
from rcpo.builtin.make_tiny_vision import IMAGE
from rcpo.commands.bench import options_of
from rcpo.commands.parser import command_parser

pytestmark = [pytest.mark.ci("TRL's own losses", needs="trl"), pytest.mark.timeout(300)]
WORDS = (
    "--images", "side=28,hidden=32,layers=1,heads=2", "--repeats", "1", "--steps", "1", "--no-shares",
    "--shape", "layers=1,hidden=16,intermediate=24,heads=2,vocabulary=97", "--calibrations", "off",
    "--lengths", "prompt=6,response=5", "--baseline", "trl,twice", "objective=dpo", "model.vision=train",
    "train.pairs_per_step=4", "train.pairs_per_device=2", "optim.lr=1e-4",
)  # fmt: skip


def test_rcpo_trl_and_images_encoded_twice_do_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient of the first step, tower included; 4 tokens of an image of 28 x 28 pixels, and the
    losses after one more step."""
    monkeypatch.setattr(plan, "_run_processes", run_forked)
    outcome = run_bench(options_of(command_parser("bench").parse(list(WORDS))), tmp_path, lambda line: None)
    assert set(outcome.checks) == {"trl", "twice"}
    for difference in outcome.checks.values():
        assert max(difference.values()) < 1e-4
    losses = {name: blocks[0]["losses"] for name, blocks in outcome.blocks.items()}
    assert all(own == pytest.approx(losses["off"], abs=1e-4) for own in losses.values())
    prompt = outcome.pairs[0].chosen.input_ids[: outcome.pairs[0].chosen.num_prompt]
    assert prompt.count(SPECIAL.index(IMAGE)) == 4
    assert as_json(outcome, {}, "")["contenders"]["trl"]["blocks"][0]["peak_gb"] > 0.1
    assert any("first step of trl" in line for line in remarks(outcome))
