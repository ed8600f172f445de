"""Settings that older runs lack, which a comparison reads as their defaults: none is forgotten."""

import re
from pathlib import Path

import yaml

from helpers.compare_folders import make_run
from rcpo.common.conf import conf_dir
from rcpo.comparison.groups import compare_runs
from rcpo.comparison.keys import ABSENT, IGNORED, matches
from rcpo.comparison.load import load_run
from rcpo.config.meanings import shown

DECIDED_BY_OPTION = ("reference.name",)
"""Keys that no table has."""
FROM_THE_BEGINNING = (
    "calibration.alpha", "calibration.balance.every", "calibration.balance.limit",
    "calibration.balance.pairs", "calibration.ema_beta", "calibration.estimator", "calibration.every",
    "calibration.feedback.every", "calibration.feedback.gain", "calibration.feedback.high",
    "calibration.feedback.integral_gain", "calibration.feedback.low", "calibration.feedback.pairs",
    "calibration.feedback.smoothing", "calibration.feedback.source", "calibration.feedback.target",
    "calibration.max_log_alpha", "calibration.scope", "calibration.warmup_steps", "data.columns",
    "data.eval_pairs", "data.eval_path", "data.eval_split", "data.on_bad_row", "data.path", "data.seed",
    "data.split", "data.train_pairs", "deepspeed.extra", "deepspeed.offload", "deepspeed.stage",
    "launch.gpus_per_node", "launch.nodes", "launch.processes", "model.chat_template_kwargs",
    "model.dtype", "model.lora.alpha", "model.lora.rank", "model.lora.targets", "model.path",
    "objective.a", "objective.beta", "objective.delta", "objective.eps", "objective.f", "objective.gamma",
    "objective.lam", "objective.lambda", "objective.length_normalized", "objective.rank_weight",
    "objective.sft_weight", "objective.temperature", "objective.terms", "optim.betas", "optim.eps",
    "optim.lr", "optim.momentum", "optim.schedule", "optim.warmup_steps", "optim.weight_decay",
    "train.device", "train.epochs", "train.grad_clip", "train.max_length", "train.max_prompt_length",
    "train.pairs_per_device", "train.pairs_per_step", "train.steps",
)  # fmt: skip
"""Keys that every run has whose option, calibration or objective has them. A new key is none of them: it
belongs into ABSENT or IGNORED of rcpo/comparison/keys.py."""


def keys_and_defaults() -> dict[str, list[str]]:
    """Of conf/README.md, which a test of its own holds to the schema."""
    found: dict[str, list[str]] = {}
    for line in (conf_dir() / "README.md").read_text().splitlines():
        if known := re.match(r"\| (?:\w+ \| )?`([\w.]+)` \| (`[^|]*`)", line):
            found.setdefault(known[1], []).append(known[2])
    return found


def test_every_key_is_said_to_be_new_or_not() -> None:
    keys = keys_and_defaults()
    assert len(keys) > 150
    unsaid = {key for key in keys if key not in ABSENT and not matches(key, IGNORED)}
    assert unsaid == set(FROM_THE_BEGINNING)


def test_what_is_absent_is_the_default() -> None:
    """A key whose default changes means something else in older runs, and cannot stay there as it is."""
    keys = keys_and_defaults()
    for key, value in ABSENT.items():
        if key not in DECIDED_BY_OPTION:
            assert any(f"`{shown(value)}`" in text for text in keys[key]), key


def test_an_older_run_is_of_the_group_of_a_newer_one(tmp_path: Path) -> None:
    """It lacks keys; at their defaults the newer one is of its group, at another value of another one, which
    differs in that key alone."""
    older, same, other = (tmp_path / name for name in ("older", "same", "other"))
    make_run(older, seed=0)
    make_run(same, seed=1, settings={"objective.wpo": False, "objective.ld_alpha": 1.0})
    make_run(other, seed=2, settings={"objective.wpo": False, "objective.ld_alpha": 1.0, "data.flip": 0.1})
    config = yaml.safe_load((older / "config.yaml").read_text())
    for section, key in (("data", "flip"), ("reference", "sync_every"), ("train", "packing")):
        del config[section][key]
    (older / "config.yaml").write_text(yaml.safe_dump(config))
    compared = compare_runs([load_run(path) for path in (older, same, other)])
    assert sorted(group.seeds for group in compared.groups) == ["0,1", "2"]
    assert compared.differing == ["data.flip"]
    (group,) = compare_runs([load_run(older)]).groups
    assert "data.flip" not in group.settings
