"""Which settings of a run matter to a comparison, and for what. Knows no run: patterns of keys alone."""

import fnmatch
from collections.abc import Iterable
from typing import Any

IGNORED = (
    "seed",
    "name",
    "run_dir",
    "tracking.*",
    "metrics.*",
    "cluster.*",
    "train.save_every",
    "train.keep_last",
    "train.on_save_error",
    "train.on_nonfinite",
    "train.max_nonfinite_steps",
    "train.log_every",
    "train.eval_every",
    "train.keep_best",
    "train.evaluate",
    "evaluation.*",
    "model.allow_pickle",
    "model.trust_remote_code",
    "model.lora.save",
)
"""Settings that change neither training nor its speed: runs that differ in them are one group."""
ABSENT: dict[str, Any] = {
    "objective.aggregate": "mean",
    "objective.chosen_weight": 1.0,
    "objective.divergence": "reverse_kl",
    "objective.divergence_alpha": 0.5,
    "objective.dora_a": 0.5,
    "objective.dora_a_i": 0.5,
    "objective.dro_lambda": 1.0,
    "objective.kl": "mean",
    "objective.label_smoothing": 0.0,
    "objective.ld_alpha": 1.0,
    "objective.log_probs": "sum",
    "objective.max_scale": 1.0,
    "objective.module": None,
    "objective.reference_free": False,
    "objective.rejected_weight": 1.0,
    "objective.risen": "full",
    "objective.sample_weight": None,
    "objective.sft_mean": None,
    "objective.sft_of": "response",
    "objective.shift": "running_mean",
    "objective.tau": "previous",
    "objective.weight_of": "pair",
    "objective.wpo": False,
    "data.append_eos": True,
    "data.as_chat": None,
    "data.config": None,
    "data.eval_config": None,
    "data.filter.ches_max_percentile": None,
    "data.filter.ches_min_percentile": None,
    "data.filter.ches_near_percentile": None,
    "data.filter.ches_norm_max_percentile": None,
    "data.filter.ches_norm_min_percentile": None,
    "data.filter.ches_norm_near_percentile": None,
    "data.filter.margin_max": None,
    "data.filter.margin_min": None,
    "data.filter.nearest": None,
    "data.filter.scores": None,
    "data.flip": 0.0,
    "data.image_megapixels": 50,
    "data.lists": "whole",
    "data.mix": None,
    "data.responses": 2,
    "data.revision": None,
    "data.system": "keep",
    "data.unpair": False,
    "model.attention": None,
    "model.chat_template": None,
    "model.compile": False,
    "model.gradient_checkpointing": False,
    "model.kernels": None,
    "model.lora.adapter": None,
    "model.lora.adapter_revision": None,
    "model.lora.dropout": 0.0,
    "model.lora.on_adapter": None,
    "model.quantization": None,
    "model.response": "template",
    "model.revision": None,
    "model.router_loss": 0.0,
    "model.vision": "frozen",
    "optim.decay_ratio": 0.1,
    "optim.floor": 0.0,
    "optim.paged": False,
    "optim.smoothing": 0.99,
    "optim.warmup_ratio": None,
    "reference.bema_bias": 0.2,
    "reference.bema_lag": 10,
    "reference.bema_power": 0.5,
    "reference.name": "cached",
    "reference.pairs_per_device": None,
    "reference.path": None,
    "reference.revision": None,
    "reference.sync_every": 0,
    "reference.sync_how": "mix",
    "reference.sync_mix": 0.6,
    "train.deterministic": False,
    "train.packing": False,
    "train.share_prefix": False,
    "train.stop_when": None,
}
"""How runs of before a key was there trained. A key that is added later has to stand here, with what it is
where nobody has set it, so that a grid that grows with a newer rcpo stays one."""
SPEED_ALONE = (
    "launch.*",
    "deepspeed.*",
    "train.device",
    "train.pairs_per_device",
    "train.share_prefix",
    "train.packing",
    "train.deterministic",
    "model.attention",
    "model.kernels",
    "model.compile",
    "model.gradient_checkpointing",
    "optim.paged",
    "reference.name",
    "reference.pairs_per_device",
)
"""Settings that change the speed and rounding: other groups, but with the same baseline, and no column of
their own."""
MEASURED_ON = ("data.*", "model.*", "train.max_length", "train.max_prompt_length")
NOT_MEASURED_ON = (
    "data.filter.*",
    "data.train_pairs",
    "data.on_bad_row",
    "model.lora.*",
    "model.quantization",
)
"""Of these, what changes training and neither the held-out pairs nor the model at the start."""


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def is_of_kind(key: str) -> bool:
    """Whether it is of what was measured: the model at the start, or the held-out pairs."""
    return matches(key, MEASURED_ON) and not matches(key, NOT_MEASURED_ON) and not matches(key, SPEED_ALONE)
