"""Which settings of a run matter to a comparison, and for what. Knows no run: patterns of keys alone."""

import fnmatch
from collections.abc import Iterable

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
ABSENT = (
    ("objective.module", None),
    ("objective.log_probs", "sum"),
    ("objective.reference_free", False),
    ("objective.label_smoothing", 0.0),
    ("objective.divergence", "reverse_kl"),
    ("objective.divergence_alpha", 0.5),
    ("objective.sft_mean", None),
    ("objective.weight_of", "pair"),
    ("objective.chosen_weight", 1.0),
    ("objective.rejected_weight", 1.0),
    ("objective.shift", "running_mean"),
    ("objective.tau", "previous"),
    ("objective.max_scale", 1.0),
    ("objective.risen", "full"),
    ("reference.sync_how", "mix"),
    ("reference.bema_power", 0.5),
    ("reference.bema_bias", 0.2),
    ("reference.bema_lag", 10),
    ("optim.warmup_ratio", None),
    ("optim.decay_ratio", 0.1),
    ("optim.floor", 0.0),
    ("optim.smoothing", 0.99),
    ("train.deterministic", False),
    ("train.stop_when", None),
)
"""Settings that runs of before the key was there do not have, and that mean the same."""
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
