"""Rules that join several keys of a config, or that are another library's: one line for the first that is
broken.

Types and ranges of single keys are in `rcpo.config.schema`, whose `validate` calls this. What depends on the
machine is in `rcpo.config.resolve`, what on the data and the model in `rcpo.training.read_inputs`.
"""

import dataclasses

from rcpo.common.conf import value_in_conf
from rcpo.common.errors import UserError, shortened
from rcpo.config.calibration import CalibrationConfig
from rcpo.config.conditions import check_conditions
from rcpo.config.evaluation import check_option
from rcpo.config.names import TINY, TINY_VISION
from rcpo.config.schema import Config, DataConfig, FilterConfig, LoraConfig, OptimConfig, TrackingConfig
from rcpo.objectives import composition_of, objective_of


def check_combinations(config: Config) -> None:
    """Rules that join several keys."""
    _check_model(config)
    composition_of(config.objective)
    objective_of(config.objective, fresh=True)
    train, data = config.train, config.data
    if train.steps is not None and train.epochs is not None:
        raise UserError(
            f"train.steps={train.steps} and train.epochs={train.epochs}: give one of the two; "
            "type train.steps=null or train.epochs=null"
        )
    if train.max_prompt_length is not None and train.max_prompt_length >= train.max_length:
        raise UserError(
            f"train.max_prompt_length={train.max_prompt_length}: must be less than "
            f"train.max_length={train.max_length}, so that a response has room; "
            f"type train.max_prompt_length={max(1, train.max_length // 2)}"
        )
    _check_places(data)
    _check_filter(data.filter)
    if config.deepspeed.offload == "optimizer" and config.deepspeed.stage == 0:
        raise UserError("deepspeed.offload=optimizer: needs ZeRO 1, 2 or 3; type deepspeed.stage=2")
    _check_tracking(config.tracking)
    check_calibration(config.calibration)
    _check_published(config)
    _check_mismatched(config)
    _check_builtin(config)
    _check_reference(config)
    _check_sync(config)
    if config.calibration.scope == "lora_last" and config.model.lora.rank is None:
        raise UserError(
            "calibration.scope=lora_last: there is no adapter to measure; type model.lora.rank=16 as well, "
            "or calibration.scope=full"
        )
    _check_optimizer(config)
    if config.model.router_loss and config.train.share_prefix:
        raise UserError(
            f"model.router_loss={config.model.router_loss}: counts the tokens of both responses' rows, and "
            "train.share_prefix=true computes prompts once; type train.share_prefix=false"
        )
    check_conditions(config, objective_of(config.objective).reads_tokens)
    _check_answers(config)
    check_option(config.train.evaluate, config.evaluation.name)


def _check_optimizer(config: Config) -> None:
    """Rules of the optimizer."""
    optim = config.optim
    if optim.paged and optim.name != "adamw_8bit":
        raise UserError(f"optim.paged=true: is not of optim={optim.name}; type optim=adamw_8bit as well")
    if optim.name == "adamw_8bit" and config.deepspeed.offload == "optimizer":
        raise UserError(
            "deepspeed.offload=optimizer: leaves no moments on the GPU to hold in 8 bits; type optim=adamw, "
            "or deepspeed.offload=none optim.paged=true"
        )
    if optim.name == "sgd" and optim.lr is None:
        raise UserError("optim.lr: has no value and optim=sgd needs one; type optim.lr=0.01")
    if optim.warmup_ratio is not None and optim.warmup_steps > 0:
        raise UserError(
            f"optim.warmup_ratio={optim.warmup_ratio}: says the same as "
            f"optim.warmup_steps={optim.warmup_steps}; type optim.warmup_steps=0 or optim.warmup_ratio=null"
        )
    if optim.floor > 0 and optim.schedule not in ("cosine", "wsd"):
        raise UserError(
            f"optim.floor={optim.floor}: has no effect with optim.schedule={optim.schedule}; type "
            "optim.schedule=cosine or optim.schedule=wsd, or optim.floor=0"
        )
    if optim.decay_ratio != OptimConfig(name="adamw").decay_ratio and optim.schedule != "wsd":
        raise UserError(
            f"optim.decay_ratio={optim.decay_ratio}: has no effect with optim.schedule={optim.schedule}; "
            "type optim.schedule=wsd"
        )


def _check_model(config: Config) -> None:
    """Rules of adapters, quantization and compiled layers."""
    model, lora = config.model, config.model.lora
    if model.compile and config.deepspeed.stage == 3:
        raise UserError(
            "model.compile=true: cannot compile around stage 3, which gathers weights within every layer; "
            "type deepspeed.stage=2, or model.compile=false"
        )
    if model.compile and model.quantization is not None:
        raise UserError(
            f"model.compile=true: cannot compile model.quantization={model.quantization}; type "
            "model.compile=false"
        )
    if lora.rank is None:
        untouched = LoraConfig()
        for field in dataclasses.fields(LoraConfig):
            value, default = getattr(lora, field.name), getattr(untouched, field.name)
            if value != default:
                shown = f"[{','.join(value)}]" if isinstance(value, list) else value
                raise UserError(
                    f"model.lora.{field.name}={shown}: has no effect without an adapter to train; type "
                    f"model.lora.rank=16, or model.lora.{field.name}={'null' if default is None else default}"
                )
        if model.vision == "lora":
            raise UserError(
                "model.vision=lora: there is no adapter; type model.lora.rank=16 as well, or "
                "model.vision=train"
            )
        if model.quantization is not None:
            raise UserError(
                f"model.quantization={model.quantization}: quantized weights cannot train, so it needs an "
                "adapter; type model.lora.rank=16"
            )
        return
    if not lora.targets:
        raise UserError("model.lora.targets=[]: names no layer; type model.lora.targets=all-linear")
    if lora.adapter is not None and lora.on_adapter is None:
        raise UserError(
            f"model.lora.adapter={lora.adapter}: must be merged into the base or kept frozen beside the new "
            "one; type model.lora.on_adapter=merge or model.lora.on_adapter=stack"
        )
    if lora.adapter is None and lora.on_adapter is not None:
        raise UserError(
            f"model.lora.on_adapter={lora.on_adapter}: there is no adapter to {lora.on_adapter}; "
            "type model.lora.adapter=PATH"
        )
    if model.quantization is None:
        return
    if lora.on_adapter == "merge":
        raise UserError(
            "model.lora.on_adapter=merge: cannot be done with 4-bit weights; type model.lora.on_adapter=stack"
        )
    if lora.save == "merged":
        raise UserError(
            "model.lora.save=merged: cannot be done with 4-bit weights; type model.lora.save=adapter"
        )
    if config.deepspeed.stage == 3:
        raise UserError("deepspeed.stage=3: does not shard 4-bit weights here; type deepspeed.stage=2")


def _check_answers(config: Config) -> None:
    """Answers are written with a cache of keys, which rcpo's own masks know nothing of."""
    attention, num_answers = config.model.attention, config.metrics.answers
    if num_answers and attention in ("varlen", "flex_attention"):
        raise UserError(
            f"metrics.answers={num_answers}: model.attention={attention} cannot write answers token by "
            "token; type metrics.answers=0, or model.attention=sdpa"
        )


def _check_tracking(tracking: TrackingConfig) -> None:
    """W&B's own rules for names (wandb 0.31), told before the run rather than in its middle."""
    for key, limit in (("project", 128), ("entity", 128), ("group", 128)):
        value = getattr(tracking, key)
        if value is not None and len(value) > limit:
            raise UserError(
                f"tracking.{key}={shortened(value)}: must be at most {limit} characters; "
                f"type tracking.{key}=NAME"
            )
    if found := next((letter for letter in tracking.project if letter in "/\\#?%:"), None):
        raise UserError(
            f"tracking.project={tracking.project}: must not hold {found}, which W&B does not take; "
            "type tracking.project=NAME"
        )
    if tracking.log_model and (tracking.name != "wandb" or tracking.mode == "disabled"):
        off = f"tracking={tracking.name}" if tracking.name != "wandb" else "tracking.mode=disabled"
        raise UserError(
            f"tracking.log_model=true: sends nothing with {off}; type tracking=wandb tracking.mode=auto as "
            "well, or tracking.log_model=false"
        )


def _check_places(data: DataConfig) -> None:
    """Where pairs are read from."""
    if data.source != "file" and data.mix is not None:
        raise UserError(f"data.mix: data={data.source} reads no file; type data=file")
    if data.source != "arithmetic" and data.responses != 2:
        others = "a file has as many as its rows" if data.source == "file" else "pictures have pairs"
        raise UserError(
            f"data.responses={data.responses}: is of data=arithmetic; {others}; type data.responses=2"
        )
    if data.source != "file":
        return
    if data.path is None and data.mix is None:
        raise UserError("data.path: has no value and data=file needs one; type data.path=PAIRS.jsonl")
    if data.mix is None:
        return
    if data.path is not None:
        raise UserError("data.path and data.mix: give one of the two; type data=file data.mix=... alone")
    for key in ("split", "config"):
        if (value := getattr(data, key)) is not None:
            raise UserError(
                f"data.{key}={value}: is of data.path; with data.mix give it to a source: "
                f"data.mix='[{{path: PATH, weight: 1, {key}: {value}}}, ...]'"
            )
        if (value := getattr(data, f"eval_{key}")) is not None and data.eval_path is None:
            raise UserError(
                f"data.eval_{key}={value}: with data.mix it needs data.eval_path; type that as well"
            )


NEAR = ("ches_near_percentile", "ches_norm_near_percentile")
"""Keys of `data.filter` that go with `nearest`."""


def _check_filter(given: FilterConfig) -> None:
    """Keys that do nothing alone, or exclude each other."""
    limits = [field.name for field in dataclasses.fields(given) if field.name != "scores"]
    key = next((name for name in limits if getattr(given, name) is not None), None)
    if key is not None and given.scores is None:
        raise UserError(
            f"data.filter.{key}={getattr(given, key):g}: needs the pairs' scores; type "
            "data.filter.scores=scores.parquet, a file that rcpo score writes"
        )
    if key is None and given.scores is not None:
        raise UserError(
            f"data.filter.scores={given.scores}: leaves nothing out without a limit; type "
            "data.filter.ches_norm_max_percentile=5 as well, or data.filter.scores=null"
        )
    ends = (
        ("margin_min", "margin_max"),
        ("ches_min_percentile", "ches_max_percentile"),
        ("ches_norm_min_percentile", "ches_norm_max_percentile"),
    )
    for lowest, highest in ends:
        low, high = getattr(given, lowest), getattr(given, highest)
        if low is not None and high is not None and low > high:
            raise UserError(
                f"data.filter.{lowest}={low:g}: must be at most data.filter.{highest}={high:g}; "
                f"type data.filter.{lowest}=null"
            )
    _check_nearest(given)


def _check_nearest(given: FilterConfig) -> None:
    """One percentile to be near to, and how many."""
    around = [name for name in NEAR if getattr(given, name) is not None]
    if len(around) > 1:
        both = " ".join(f"data.filter.{name}={getattr(given, name):g}" for name in around)
        raise UserError(f"{both}: only one can be the middle; type data.filter.{around[0]}=null")
    if around and given.nearest is None:
        raise UserError(
            f"data.filter.{around[0]}={getattr(given, around[0]):g}: needs the number of pairs; "
            "type data.filter.nearest=512 as well"
        )
    if given.nearest is not None and not around:
        raise UserError(
            f"data.filter.nearest={given.nearest}: needs the percentile to be near to; type "
            "data.filter.ches_norm_near_percentile=50 as well"
        )


def _check_reference(config: Config) -> None:
    """What cannot be with weights of the reference's own."""
    path = config.reference.path
    if path is None or not objective_of(config.objective).needs_reference:
        return
    calibration = config.calibration
    if calibration.name == "feedback" and calibration.feedback.source == "batch":
        raise UserError(
            f"calibration.feedback.source=batch: would steer by the distance from reference.path={path}, "
            "which is not displacement; type calibration.feedback.source=probe"
        )
    if config.model.quantization is not None:
        raise UserError(
            f"reference.path={path}: cannot be held beside a policy with "
            f"model.quantization={config.model.quantization}; type reference.path=null, or "
            "model.quantization=null"
        )


def _check_sync(config: Config) -> None:
    """What cannot follow the policy."""
    every, how = config.reference.sync_every, config.reference.sync_how
    kinds = {"sync_how": how, "sync_mix": "mix"} | dict.fromkeys(
        ("bema_power", "bema_bias", "bema_lag"), "bema"
    )
    for key, kind in kinds.items():
        value, shipped = getattr(config.reference, key), value_in_conf(("reference/cached",), key)
        if value != shipped and not (every and how == kind):
            lacks, typed = (f"sync_how={kind}",) * 2 if every else ("sync_every", "sync_every=512")
            raise UserError(
                f"reference.{key}={value}: has no effect without reference.{lacks}; type "
                f"reference.{typed}, or reference.{key}={shipped}"
            )
    if not every:
        return
    objective, why = objective_of(config.objective), None
    if not objective.needs_reference:
        why = f"objective={objective.name} reads no reference"
    elif objective.weighs_tokens:
        why = f"objective={objective.name} weighs tokens by log-ratios to the reference of the start"
    elif config.reference.path is not None:
        why = f"reference.path={config.reference.path} is another model, and no policy of this run"
    elif config.model.lora.rank is not None:
        why = "with model.lora.rank the reference is the policy without its adapter, whose weights stay"
    if why is not None:
        raise UserError(f"reference.sync_every={every}: {why}; type reference.sync_every=0")


def _check_builtin(config: Config) -> None:
    """The models that ship know the words of the pairs that ship with them."""
    if config.model.path == TINY_VISION and config.data.source == "arithmetic":
        raise UserError("model=tiny_vision: knows the words of data=shapes alone; type data=shapes as well")
    if config.model.path == TINY and config.data.source == "shapes":
        raise UserError("data=shapes: has pictures, and model=tiny sees none; type model=tiny_vision as well")


def _check_mismatched(config: Config) -> None:
    """What has no other pair to take responses from."""
    objective = objective_of(config.objective)
    if objective.needs_mismatched and config.train.pairs_per_step == 1:
        raise UserError(
            f"train.pairs_per_step=1: objective={objective.name} reads each prompt with the responses of "
            "another pair of its step, and there is none; type train.pairs_per_step=2 or more"
        )


def _check_published(config: Config) -> None:
    """What cannot give every micro-batch its own scores before it goes backward."""
    scope = config.calibration.scope or ("head" if config.model.lora.rank is None else "lora_last")
    if config.calibration.name != "published":
        return
    if scope == "lora_last" and config.deepspeed.stage == 3:
        raise UserError(
            "deepspeed.stage=3: takes each backward pass right after its own forward pass, and "
            "calibration=published with scope=lora_last three after one; type deepspeed.stage=2"
        )
    objective = objective_of(config.objective)
    if objective.weighs_tokens:
        raise UserError(
            f"objective={objective.name}: weighs tokens by what the forward pass finds, and "
            "calibration=published reads their scores in that pass; type calibration=on"
        )


def check_calibration(calibration: CalibrationConfig) -> None:
    """Rules that join several keys of one calibration."""
    if calibration.alpha != 1.0 and calibration.name != "fixed":
        raise UserError(
            f"calibration.alpha={calibration.alpha}: is for a constant alpha; type calibration=fixed as well"
        )
    if calibration.name == "published":
        for key, value, right in (("estimator", "weighted", "mean"), ("scope", "full", "null")):
            if getattr(calibration, key) == value:
                raise UserError(
                    f"calibration.{key}={value}: is not of the published protocol; type "
                    f"calibration.{key}={right}, or calibration=on"
                )
    feedback = calibration.feedback
    if feedback.high is not None and feedback.high < feedback.low:
        raise UserError(
            f"calibration.feedback.high={feedback.high}: must be at least "
            f"calibration.feedback.low={feedback.low}; type calibration.feedback.high=null"
        )
