"""Invariant 7: every ZeRO stage on two ranks trains as the plain loop, and its files hold what it trained.

At stage 3 even these tiny parameters are sharded and released between uses.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import forked
from helpers.cases import RELEASING, Case, Layout, make_config, make_run, write_inputs
from helpers.rank_runs import train_all
from helpers.same_run import assert_equals_plain, final_weights, plain_run
from helpers.selection import asked_for, matrix
from rcpo.config.schema import Config
from rcpo.runs.folder import RunFolder

STAGES = (0, 1, 2, 3)
CLIP = "train.grad_clip=0.3"
CASES = {
    Case("simpo", "on", "llama-tied", "adamw"): STAGES,
    Case("dpo", "on", "neox", "sgd"): STAGES,
    Case("ipo", "on", "neox-tied", "adamw"): (2, 3),
    Case("dpo", "off", "llama", "sgd"): (0, 3),
}
"""What is trained at which stages: each architecture tied and untied, both optimizers."""
RUNS = [(case, stage) for case, stages in CASES.items() for stage in stages]

ALWAYS = {*((Case("simpo", "on", "llama-tied", "adamw"), stage) for stage in STAGES)} | {
    (Case("dpo", "on", "neox", "sgd"), 3)
}
"""Every stage, and what the tests below read."""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Case, int], tuple[Config, RunFolder]]:
    """Every case at its stages by one launch of two ranks, 2 pairs x 2 micro-batches each."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    asked = {(params["case"], params["stage"]) for params in asked_for(request) if "case" in params}
    for case, stage in [row for row in RUNS if row in asked | ALWAYS]:
        layout = Layout(2, 2, stage)
        config = make_config(inputs, folder / f"{case}-{layout}", case, layout, "train.save_every=3", CLIP)
        made[case, stage] = config, make_run(config)
    train_all([run for _, run in made.values()], 2, timeout_seconds=200)
    return made


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("case", "stage"), matrix(RUNS, ALWAYS.__contains__, "rows of matrices"), ids=str)
def test_every_stage_trains_as_the_plain_loop(
    case: Case, stage: int, runs: dict[tuple[Case, int], tuple[Config, RunFolder]]
) -> None:
    """Weights after 6 steps to 1e-5; loss, alpha, score norms and gradient norm of every step. Clipping was
    at work."""
    config, run = runs[case, stage]
    assert (config.deepspeed.stage, config.world_size()) == (stage, 2)
    plain = plain_run(config)
    assert_equals_plain(run, plain, 1e-5)
    assert max(row["train/grad_norm"] for row in plain.rows) > config.train.grad_clip


@pytest.mark.parametrize("stage", STAGES)
def test_exported_checkpoint_is_the_trained_model(
    stage: int, runs: dict[tuple[Case, int], tuple[Config, RunFolder]], tmp_path: Path
) -> None:
    """`rcpo export` of step 6, the last: transformers loads it and its tokenizer; weights equal final/ bit
    for bit; the tied embedding is stored once."""
    from rcpo.cli import dispatch

    case = Case("simpo", "on", "llama-tied", "adamw")
    _, run = runs[case, stage]
    assert dispatch(["export", str(run.path), str(tmp_path / "out"), "step=6"]) == 0
    expected = final_weights(run)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    named = dict(model.named_parameters())
    assert set(named) == set(expected)
    assert all(torch.equal(named[name], weight) for name, weight in expected.items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == set(expected)
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118  (not a dict)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w36")["input_ids"] == [3, 36]


def test_stage_3_really_shards_these_parameters(
    runs: dict[tuple[Case, int], tuple[Config, RunFolder]],
) -> None:
    """The settings that reach DeepSpeed, and the shards in its checkpoint: each of 2 ranks keeps about half
    of the numbers. Otherwise the stage-3 rows of the test above would pass for the wrong reason."""
    from rcpo.engine.engine import deepspeed_config

    config, run = runs[Case("dpo", "on", "neox", "sgd"), 3]
    assert RELEASING.items() <= deepspeed_config(config)["zero_optimization"].items()
    whole = sum(weight.numel() for weight in final_weights(run).values())
    for number in range(2):
        shard = run.checkpoints / "step-000006/engine" / f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt"
        groups = torch.load(shard, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]
        assert abs(sum(group.numel() for group in groups) - whole / 2) < 0.05 * whole


@pytest.mark.timeout(100)
def test_deepspeed_settings_of_the_command_line_arrive(tmp_path: Path) -> None:
    """A key below deepspeed.extra as a user types it: found in the composed config."""
    word = "+deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=0"
    done = forked.rcpo("train", word, "--cfg", "job", cwd=tmp_path, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert "stage3_param_persistence_threshold: 0" in done.stdout
