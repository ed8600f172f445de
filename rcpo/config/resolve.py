"""Fill in what the config leaves to rcpo (null), so that RUN/config.yaml says everything that was decided.

Called once, by the process that composed the config, before it is frozen. Depends on the machine only through
the device and through the number of ranks.
"""

import dataclasses
from typing import Any, Literal

import torch

from rcpo.common.errors import UserError
from rcpo.config.names import (
    BUILTIN,
    absolute,
    absolute_glob,
    absolute_run_dir,
    all_absolute,
    check_name,
    data_label,
    default_name,
    model_label,
)
from rcpo.config.resolved import ResolvedConfig, as_resolved
from rcpo.config.schema import Config, LaunchConfig, MixPart, ModelConfig, Stage, TrackingConfig
from rcpo.objectives import objective_of


def resolve(
    config: Config, joined_world_size: int | None, device_is_elsewhere: bool = False
) -> ResolvedConfig:
    """Return `config` without nulls that later code would have to interpret.

    `joined_world_size` is the number of ranks that torchrun or srun has already started, or None. With
    `device_is_elsewhere` srun will start them, and train.device is taken as it is.
    Raises UserError where sizes do not divide or the device is absent.
    """
    device = config.train.device if device_is_elsewhere else _device(config)
    tiny = config.model.path in BUILTIN
    launch = _launch(config, device, joined_world_size)
    config = dataclasses.replace(config, launch=launch)
    train = dataclasses.replace(
        config.train, device=device, pairs_per_device=_pairs_per_device(config, device, tiny)
    )
    if train.eval_every is None:
        train = dataclasses.replace(train, eval_every=25 if tiny else 100)
    if train.steps is None and train.epochs is None:
        train = (
            dataclasses.replace(train, steps=150)
            if config.data.source != "file"
            else dataclasses.replace(train, epochs=1.0)
        )
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    _check_stage_0(config, dtype)
    name = default_name(config) if config.name is None else config.name
    check_name(name)
    return as_resolved(
        dataclasses.replace(
            config,
            # The parameters that were not given too: no YAML file lists those of a user's own objective.
            objective=config.objective | objective_of(config.objective).params(),
            name=name,
            run_dir=absolute_run_dir(config.run_dir or f"runs/{name}"),
            train=train,
            calibration=dataclasses.replace(config.calibration, scope=_scope(config)),
            model=_model(config.model, dtype),
            data=dataclasses.replace(
                config.data,
                path=all_absolute(config.data.path),
                mix=_mix(config.data.mix),
                eval_path=all_absolute(config.data.eval_path),
                filter=dataclasses.replace(config.data.filter, scores=absolute(config.data.filter.scores)),
            ),
            optim=dataclasses.replace(config.optim, lr=config.optim.lr or _default_lr(config)),
            reference=dataclasses.replace(config.reference, path=absolute(config.reference.path)),
            deepspeed=dataclasses.replace(config.deepspeed, stage=_stage(config, device)),
            tracking=_tracking(config),
            evaluation=dataclasses.replace(
                config.evaluation,
                tasks_dir=absolute(config.evaluation.tasks_dir),
                questions=config.evaluation.questions and absolute_glob(config.evaluation.questions),
                questions_images=absolute(config.evaluation.questions_images),
            ),
        )
    )


def _check_stage_0(config: Config, dtype: str) -> None:
    """Raise UserError where this torch would add gradients of bf16 weights up in bf16."""
    if config.deepspeed.stage == 0 and dtype == "bfloat16" and not hasattr(torch.Tensor, "grad_dtype"):
        raise UserError(
            "deepspeed.stage=0: with model.dtype=bfloat16 it needs torch 2.10 or newer, to add gradients up "
            f"in fp32, and this is {torch.__version__}; type deepspeed.stage=1"
        )


def _stage(config: Config, device: str) -> Stage | None:
    """By the GPUs' memory, where they are: `rcpo.launch.stage`."""
    return 1 if device == "cpu" and config.deepspeed.stage is None else config.deepspeed.stage


def _scope(config: Config) -> Literal["head", "lora_last", "full"]:
    """What calibration measures."""
    given = config.calibration.scope
    return given or ("head" if config.model.lora.rank is None else "lora_last")


def _default_lr(config: Config) -> float:
    """An adapter takes about ten times the rate that all weights do."""
    lr, with_adapter = (3e-4, 3e-3) if config.model.path in BUILTIN else (1e-6, 1e-5)
    return lr if config.model.lora.rank is None else with_adapter


def _mix(parts: list[MixPart] | None) -> list[MixPart] | None:
    if parts is None:
        return None
    return [dataclasses.replace(part, path=all_absolute(part.path) or part.path) for part in parts]


def _model(model: ModelConfig, dtype: Any) -> ModelConfig:
    """The dtype and the local files of a model."""
    return dataclasses.replace(
        model,
        dtype=dtype,
        path=absolute(model.path) or model.path,
        lora=dataclasses.replace(model.lora, adapter=absolute(model.lora.adapter)),
        chat_template=model.chat_template
        if model.chat_template == "plain"
        else absolute(model.chat_template),
    )


def _device(config: Config) -> Literal["cpu", "cuda"]:
    device = config.train.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda: no CUDA device is visible here; type train.device=cpu")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _launch(config: Config, device: str, joined: int | None) -> LaunchConfig:
    launch = config.launch
    gpus = launch.gpus_per_node
    if device == "cpu" and gpus is not None:
        raise UserError(
            f"launch.gpus_per_node={gpus}: no CUDA device is used here; "
            f"type launch.processes={gpus} for CPU ranks"
        )
    if device == "cuda" and launch.processes > 1:
        raise UserError(
            f"launch.processes={launch.processes}: is for CPU ranks; "
            f"type launch.gpus_per_node={launch.processes}"
        )
    if device == "cuda":
        gpus = gpus or (1 if joined is None else max(1, joined // launch.nodes))
        visible = torch.cuda.device_count()
        if joined is None and gpus > visible:
            raise UserError(
                f"launch.gpus_per_node={gpus}: {visible} are visible; type launch.gpus_per_node={visible}"
            )
    if joined is not None:
        # torchrun or srun has decided how many ranks there are.
        if joined % launch.nodes:
            raise UserError(
                f"launch.nodes={launch.nodes}: must divide the {joined} ranks that were started; "
                "type launch.nodes=1"
            )
        per_node = joined // launch.nodes
        key = {"gpus_per_node": per_node} if device == "cuda" else {"processes": per_node}
        return dataclasses.replace(launch, **key)
    if launch.nodes > 1:
        raise UserError(
            f"launch.nodes={launch.nodes}: ranks on several nodes are started by torchrun or srun, one task "
            "per GPU; type launch.nodes=1 here"
        )
    return dataclasses.replace(launch, gpus_per_node=gpus)


def _pairs_per_device(config: Config, device: str, tiny: bool) -> int:
    """The micro-batch of one rank; ranks x micro-batch x accumulation must give pairs_per_step exactly."""
    train, ranks = config.train, config.world_size()
    if train.pairs_per_step % ranks:
        raise UserError(
            f"train.pairs_per_step={train.pairs_per_step}: must be a multiple of the {ranks} ranks; "
            f"type train.pairs_per_step={-(-train.pairs_per_step // ranks) * ranks}"
        )
    share = train.pairs_per_step // ranks
    if train.pairs_per_device is None:
        return default_micro_batch(share, device, tiny, train.max_length)
    if share % train.pairs_per_device:
        fitting = max(size for size in range(1, min(train.pairs_per_device, share) + 1) if share % size == 0)
        raise UserError(
            f"train.pairs_per_device={train.pairs_per_device}: must divide the {share} pairs that each "
            f"of {ranks} ranks has of train.pairs_per_step={train.pairs_per_step}; "
            f"type train.pairs_per_device={fitting}"
        )
    return train.pairs_per_device


TOKENS_A_SIDE = 8192
"""Of a micro-batch on a GPU, about: matrix products of 16,384 tokens, both sides, are bound by arithmetic."""


def default_micro_batch(share: int, device: str, tiny: bool, max_length: int) -> int:
    """Pairs: the largest divisor of a rank's `share` up to 16 for builtin:tiny, 4 on a CPU, and on a GPU as
    many as `TOKENS_A_SIDE` holds, from 4 to 16."""
    limit = 4 if device == "cpu" else max(4, min(16, TOKENS_A_SIDE // max_length))
    return max(size for size in range(1, min(16 if tiny else limit, share) + 1) if share % size == 0)


def _tracking(config: Config) -> TrackingConfig:
    own = [
        config.objective["name"],
        f"calibration-{config.calibration.name}",
        model_label(config),
        data_label(config),
    ]
    tags = [tag[:64] for tag in [*own, *config.tracking.tags]]  # W&B's limit
    return dataclasses.replace(config.tracking, tags=list(dict.fromkeys(tags)))
