"""Whether two trainings are the same: rows, weights, and the plain loop as the oracle."""

import json
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.plain_loop import PlainRun, Settings, Steering, train_plainly
from rcpo.config.resolved import ResolvedConfig
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree
from rcpo.training.read_inputs import read_inputs


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl but for what a clock or the memory decides."""
    rows = run.rows(run.metrics)
    return [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in rows]


def final_weights(run: RunFolder) -> dict[str, Tensor]:
    return load_file(run.final / "model.safetensors")


_PLAIN: dict[str, PlainRun] = {}


def plain_run(config: ResolvedConfig) -> PlainRun:
    """The same training by `plain_loop`, from the tokenised pairs and the data order of the config; once for
    all layouts."""
    tree = config_tree(config)
    ours = {key: value for key, value in tree["train"].items() if key != "pairs_per_device"}
    kept = {
        key: tree[key] for key in ("objective", "calibration", "model", "data", "optim", "reference", "seed")
    }
    key = json.dumps([kept, ours], sort_keys=True)
    if key not in _PLAIN:
        _PLAIN[key] = _train_plainly(config)
    return _PLAIN[key]


def _train_plainly(config: ResolvedConfig) -> PlainRun:
    case = config.objective["name"], config.calibration.name, config.optim.name
    band = config.calibration
    inputs = read_inputs(config)
    sampler = inputs.sampler(config)
    settings = Settings(
        *case, config.optim.lr, config.train.grad_clip, band.scope, band.estimator, band.every,
        band.warmup_steps, band.ema_beta,
        config.objective["dro_lambda"] if config.objective["aggregate"] == "kl_dro" else None,
        band.alpha, _steering(config, sampler.num_fresh_steps),
        band.balance.every if band.name == "balance" else None, config.train.max_length,
    )  # fmt: skip
    batches = [sampler.global_batch(step) for step in range(inputs.num_steps(config))]
    model = AutoModelForCausalLM.from_pretrained(config.model.path, attn_implementation="eager")
    probe = inputs.held_out[: band.probe_pairs]
    reference = None
    if config.reference.path is not None:
        reference = AutoModelForCausalLM.from_pretrained(config.reference.path, attn_implementation="eager")
    return train_plainly(model.float(), inputs.train, batches, settings, probe, reference)


def _steering(config: ResolvedConfig, num_fresh_steps: int) -> Steering | None:
    loop = config.calibration.feedback
    if config.calibration.name != "feedback":
        return None
    high = config.calibration.max_log_alpha if loop.high is None else loop.high
    return Steering(
        loop.gain, loop.integral_gain, loop.smoothing, loop.low, high, loop.every,
        num_fresh_steps if loop.source == "batch" else 0,
    )  # fmt: skip


def assert_equals_plain(run: RunFolder, plain: PlainRun, tolerance: float) -> None:
    """Weights of final/ as transformers loads them to `tolerance` absolute; every number that the plain loop
    knows to 1e-4 relative."""
    weights = dict(AutoModelForCausalLM.from_pretrained(run.final).named_parameters())
    assert set(weights) == set(plain.weights)
    for name, weight in weights.items():
        expected = plain.weights[name]
        torch.testing.assert_close(weight, expected, atol=tolerance, rtol=0, msg=f"{run.path}: {name}")
    rows = metrics(run)
    assert len(rows) == len(plain.rows)
    for row, expected in zip(rows, plain.rows, strict=True):
        for key, value in expected.items():
            assert abs(row[key] - value) <= 1e-4 * abs(value) + 2e-5, (
                run.path,
                row["step"],
                key,
                row[key],
                value,
            )


SIGNS = {f"displacement/{name}" for name in ("accuracy", "chosen_down", "both_down")} | {"dynamics/pathway"}
"""Counts of signs: in step 1, where r = z - ref is rounding alone (and with it apo_down's d_w), they tell
nothing."""


def assert_equal_rows(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    """The same keys in every row, values to fp32 tolerance."""
    assert [list(row) for row in left] == [list(row) for row in right]
    for one, other in zip(left, right, strict=True):
        for key in set(one) - (SIGNS if one["step"] == 1 else set()):
            torch.testing.assert_close(
                other[key], one[key], rtol=2e-4, atol=2e-5, equal_nan=True, msg=f"{one['step']} {key}"
            )
