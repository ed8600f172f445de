"""A SLURM profile: what a cluster wants to be told, read from YAML and checked.

conf/cluster/example.yaml explains every key. Owns what a profile means for the cells' configs
(`SlurmTarget`); what it means for the batch script is in `rcpo.sweep.slurm.script`.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rcpo.common.conf import conf_dir
from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.config.resolved import ResolvedConfig
    from rcpo.config.schema import Config

CHECKS = ConfigDict(extra="forbid", use_attribute_docstrings=True)
Word = Annotated[str, StringConstraints(pattern=r"^[^\s'\"\\#`$]+$")]
"""A value in an #SBATCH line."""
Line = Annotated[str, StringConstraints(pattern=r"^[^\n\r]+$")]
Option = Annotated[str, StringConstraints(pattern=r"^-[^\n\r]+$")]
Positive = Annotated[int, Field(gt=0)]
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def _time(value: object) -> object:
    seconds_of_time(str(value))
    return value


def seconds_of_time(text: str) -> int:
    """Seconds of sbatch's --time: MINUTES, MINUTES:SECONDS, HH:MM:SS, DAYS-HH, DAYS-HH:MM, DAYS-HH:MM:SS."""
    match = TIME.fullmatch(text)
    if match is None:
        raise ValueError("must be MINUTES, HH:MM:SS or DAYS-HH:MM:SS")
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


@dataclass(frozen=True, config=CHECKS)
class Profile:
    """Keys as in conf/cluster/example.yaml; None: the cluster's own default."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    time: Annotated[Word, BeforeValidator(_time)] | None = None
    nodes: Positive = 1
    gpus_per_node: Positive | None = None
    processes: Positive | None = None
    gpu_request: Literal["gres", "gpus-per-node", "none"] = "gres"
    gpu_type: Word | None = None
    cpus_per_task: Positive = 1
    mem: Annotated[str, StringConstraints(pattern=r"^\d+[KMGT]?$")] | None = None
    modules: list[Word] = Field(default_factory=list)
    setup: list[Line] = Field(default_factory=list)
    container: Line | None = None
    python: Line | None = None
    signal_seconds: Annotated[int, Field(ge=10, le=65535)] = 120
    requeue_limit: Annotated[int, Field(ge=0)] = 100
    max_array_size: Annotated[int, Field(ge=2)] | None = None
    max_parallel: Annotated[int, Field(ge=0)] = 16
    sbatch: list[Option] = Field(default_factory=list)
    srun: list[Option] = Field(default_factory=list)

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.processes or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def throttle(self, asked: int | None) -> int | None:
        """Cells at a time, where `asked` is --max-parallel; None: as many as the cluster starts."""
        return asked or self.max_parallel or None


class SlurmTarget:
    """The machines of a profile, as the place where a sweep's cells will run (`rcpo.sweep.target.Target`)."""

    def __init__(self, profile: Profile) -> None:
        self._ranks = profile.ranks
        per_node = "processes" if profile.gpus_per_node is None else "gpus_per_node"
        device = "cpu" if profile.gpus_per_node is None else "cuda"
        self.words: Sequence[str] = (
            f"train.device={device}",
            f"launch.nodes={profile.nodes}",
            f"launch.{per_node}={profile.ranks_per_node}",
        )

    def __repr__(self) -> str:
        return f"SlurmTarget({list(self.words)}, ranks={self._ranks})"

    def resolve(self, config: "Config") -> "ResolvedConfig":
        """`config` without nulls, whatever GPUs this machine has."""
        from rcpo.config.resolve import resolve  # with torch, which a script that is shown needs not

        return resolve(config, self._ranks, device_is_elsewhere=True)


def read_profile(name: str) -> Profile:
    """The profile in conf/cluster/NAME.yaml, or in the file `name` where that is a path. Raises UserError."""
    path = _find(name)
    try:
        # Every scalar as text: a bare 12:00:00 is the number 43200 in YAML 1.1.
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(f"--slurm {name}: {said}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--slurm {name}: is not YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(tree, dict):
        raise UserError(f"--slurm {name}: must hold keys and values, as conf/cluster/example.yaml does")
    try:
        return check_profile(tree)
    except UserError as error:
        raise UserError(f"--slurm {name}: {error}") from None


def profile_names() -> list[str]:
    """The profiles that ship with rcpo."""
    return sorted(path.stem for path in (conf_dir() / "cluster").glob("*.yaml"))


def _find(name: str) -> Path:
    if "/" in name or name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in profile_names():
        raise UserError(
            f"--slurm {name}: no such profile; choose one of {', '.join(profile_names())}, or give the path "
            "of your own YAML file"
        )
    return conf_dir() / "cluster" / f"{name}.yaml"


def check_profile(tree: dict[str, Any]) -> Profile:
    """A profile from plain text values; UserError with one line for the first fault."""
    given = {key: None if value in ("null", "~", "") else value for key, value in tree.items()}
    defaults = {key for key, value in given.items() if value is None}
    try:
        profile = _ADAPTER.validate_python({key: given[key] for key in given if key not in defaults})
    except ValidationError as error:
        raise UserError(_one_line(error)) from None
    unknown = next((key for key in defaults if not hasattr(profile, key)), None)
    if unknown is not None:
        raise UserError(f"{unknown}: no such key; conf/cluster/example.yaml has them all")
    _check_combinations(profile)
    return profile


_ADAPTER = TypeAdapter(Profile)


def _one_line(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    first = next((item for item in errors if item["type"] == "unexpected_keyword_argument"), errors[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return f"{key}: no such key; conf/cluster/example.yaml has them all"
    rule = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    rule = rule.replace("String should match pattern", "must match")
    return f"{key}: {first['input']!r}: {rule[0].lower()}{rule[1:]}"


def _check_combinations(profile: Profile) -> None:
    """Rules that join several keys, and what no pattern says."""
    if profile.gpus_per_node is not None and profile.processes is not None:
        raise UserError(
            f"gpus_per_node: {profile.gpus_per_node} and processes: {profile.processes}: give one of the two"
        )
    if profile.gpu_type is not None and profile.gpus_per_node is None:
        raise UserError(f"gpu_type: {profile.gpu_type}: needs gpus_per_node")
    if profile.time is not None and seconds_of_time(profile.time) <= profile.signal_seconds:
        raise UserError(
            f"signal_seconds: {profile.signal_seconds}: must be less than time: {profile.time}, which is "
            f"{seconds_of_time(profile.time)} s"
        )
    if profile.container is not None:
        try:
            shlex.split(profile.container)
        except ValueError as error:
            raise UserError(f"container: {profile.container!r}: {error}") from None
