"""Fill in what the config leaves to rcpo (null), so that RUN/config.yaml says everything that was decided.

Called once, by the process that composed the config, before it is frozen. Depends on the machine only through
the device and through the number of ranks.
"""

import dataclasses
import re
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch

from rcpo.config.schema import Config, LaunchConfig, TrackingConfig
from rcpo.errors import UserError

TINY = "builtin:tiny"
"""`model.path` of the model that ships with rcpo."""


def resolve(config: Config, joined_world_size: int | None) -> Config:
    """Return `config` without nulls that later code would have to interpret.

    `joined_world_size` is the number of ranks that torchrun or srun has already started, or None.
    Raises UserError where sizes do not divide or the device is absent.
    """
    device = _device(config)
    tiny = config.model.path == TINY
    launch = _launch(config, device, joined_world_size)
    config = dataclasses.replace(config, launch=launch)
    train = dataclasses.replace(config.train, device=device, pairs_per_device=_pairs_per_device(config, tiny))
    if train.eval_every is None:
        train = dataclasses.replace(train, eval_every=25 if tiny else 100)
    if train.steps is None and train.epochs is None:
        train = (
            dataclasses.replace(train, steps=150)
            if config.data.source == "arithmetic"
            else dataclasses.replace(train, epochs=1.0)
        )
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    name = config.name or default_name(config)
    _check_name(name)
    return dataclasses.replace(
        config,
        name=name,
        run_dir=str(Path(config.run_dir or f"runs/{name}").absolute()),
        train=train,
        model=dataclasses.replace(config.model, dtype=dtype),
        optim=dataclasses.replace(config.optim, lr=config.optim.lr or _default_lr(config)),
        deepspeed=dataclasses.replace(
            config.deepspeed, stage=1 if config.deepspeed.stage is None else config.deepspeed.stage
        ),
        tracking=_tracking(config),
    )


def _default_lr(config: Config) -> float:
    """An adapter takes about ten times the rate that all weights do."""
    lr, with_adapter = (3e-4, 3e-3) if config.model.path == TINY else (1e-6, 1e-5)
    return lr if config.model.lora.rank is None else with_adapter


def model_label(config: Config) -> str:
    """Short name of the model for names and tags: the last part of its path."""
    return config.model.path.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]


def data_label(config: Config) -> str:
    """Short name of the data: arithmetic, or the last part of its path without suffixes."""
    if config.data.path is None:
        return config.data.source
    return config.data.path.rstrip("/").rsplit("/", 1)[-1].split(".", 1)[0]


def default_name(config: Config) -> str:
    """OBJECTIVE-CALIBRATION-MODEL-DATE-TIME, safe as a file name."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", model_label(config))
    return f"{config.objective['name']}-{config.calibration.name}-{label}-{stamp}"


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise UserError(
            f"name={name!r}: must be 1 to 128 letters, digits, '.', '_' or '-', and start with a letter or "
            "digit; type for example name=dpo-on-1"
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


def _pairs_per_device(config: Config, tiny: bool) -> int:
    """The micro-batch of one rank; ranks x micro-batch x accumulation must give pairs_per_step exactly."""
    train, ranks = config.train, config.world_size()
    if train.pairs_per_step % ranks:
        raise UserError(
            f"train.pairs_per_step={train.pairs_per_step}: must be a multiple of the {ranks} ranks; "
            f"type train.pairs_per_step={-(-train.pairs_per_step // ranks) * ranks}"
        )
    share = train.pairs_per_step // ranks
    if train.pairs_per_device is None:
        limit = 16 if tiny else 4
        return max(size for size in range(1, min(limit, share) + 1) if share % size == 0)
    if share % train.pairs_per_device:
        fitting = max(size for size in range(1, min(train.pairs_per_device, share) + 1) if share % size == 0)
        raise UserError(
            f"train.pairs_per_device={train.pairs_per_device}: must divide the {share} pairs that each "
            f"of {ranks} ranks has of train.pairs_per_step={train.pairs_per_step}; "
            f"type train.pairs_per_device={fitting}"
        )
    return train.pairs_per_device


def _tracking(config: Config) -> TrackingConfig:
    own = [
        config.objective["name"],
        f"calibration-{config.calibration.name}",
        model_label(config),
        data_label(config),
    ]
    tags = [tag[:64] for tag in [*own, *config.tracking.tags]]  # W&B's limit
    return dataclasses.replace(config.tracking, tags=list(dict.fromkeys(tags)))
