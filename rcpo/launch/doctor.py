"""What `rcpo doctor` looks at: this machine, packages, what runs would use; what to do about faults.

Owns the checks. Each is quick, changes nothing and says one line; none asks the network, none shows a secret.
`rcpo.commands.doctor` prints them.
"""

import contextlib
import io
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeAlias

Verdict: TypeAlias = Literal["ok", "note", "missing"]
"""note: runs are possible, some are not or are slower. missing: no run works."""
GIB = 2**30
NEEDED_DISK_GIB, COMFORTABLE_DISK_GIB = 1, 20
COMFORTABLE_SHM_GIB = 1
"""NCCL passes what GPUs of one node share through /dev/shm; containers often have 64 MB of it."""


PASSED_ON: tuple[str, ...] = ()
"""GPUs on which `pytest -m gpu` has passed, by their names; README says the same."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    verdict: Verdict
    seen: str
    advice: str = ""
    """What to do; empty where there is nothing to be done."""


def examine() -> list[Finding]:
    """All findings, in the order of the table. A check that fails itself is a finding too."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check()
        # A doctor must not fall ill himself: whatever is broken here is what the user asks about.
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            what = check.__name__.removeprefix("_").replace("_", " ")
            findings.append(Finding(what, "missing", f"{type(error).__name__}: {reason}", "mend this first"))
    return findings


def _python() -> Iterator[Finding]:
    """pip has refused a version that is too old."""
    yield Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")


def _packages() -> Iterator[Finding]:
    """What pyproject.toml asks for, as it was installed."""
    from packaging.requirements import Requirement

    wrong: list[str] = []
    for requirement in map(Requirement, metadata.requires("rcpo") or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"no {requirement.name}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    versions = [f"{name} {metadata.version(name)}" for name in ("rcpo", "torch", "transformers", "deepspeed")]
    if wrong:
        yield Finding("packages", "missing", ", ".join(wrong), "pip install --upgrade rcpo")
    else:
        yield Finding("packages", "ok", ", ".join(versions))


def _optional_packages() -> Iterator[Finding]:
    for name, purpose, advice in (
        ("bitsandbytes", "4bit, optim=adamw_8bit", "pip install 'rcpo[quantization]'"),
        ("liger-kernel", "model.kernels=liger", "pip install 'rcpo[liger]'"),
        ("optuna", "rcpo sweep FILE --search optuna", "pip install 'rcpo[search]'"),
        ("flash_attn", "model.attention=flash_attention_2", "pip install flash-attn"),
    ):
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "note", "not installed", f"only for {purpose}: {advice}")


def _gpus() -> Iterator[Finding]:
    import torch

    driver = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    if not torch.cuda.is_available():
        if driver and torch.version.cuda is None:
            yield Finding(
                "GPUs", "note", f"driver {driver}, but torch is a CPU build", "install torch for CUDA"
            )
        elif driver:
            yield Finding(
                "GPUs", "note", f"driver {driver}, hidden from torch", "look at CUDA_VISIBLE_DEVICES"
            )
        else:
            yield Finding(
                "GPUs", "note", "none", "train small models on the CPU, others on a machine with GPUs"
            )
        return
    devices = [torch.cuda.get_device_properties(idx) for idx in range(torch.cuda.device_count())]
    names = ", ".join(f"{device.name} {device.total_memory / GIB:.0f} GiB" for device in devices)
    yield Finding("GPUs", "ok", f"{names}; driver {driver or '?'}, CUDA {torch.version.cuda}")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("bfloat16", "ok", "in hardware")
    else:
        yield Finding("bfloat16", "note", "not in this hardware", "type model.dtype=float32")
    yield Finding(
        "tests on GPUs", "note", f"passed on: {', '.join(PASSED_ON) or 'none so far'}",
        "try yours, in a source tree: pytest -m gpu; rcpo bench --gpu FILE.md",
    )  # fmt: skip


def _collectives() -> Iterator[Finding]:
    """What ranks talk through."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        yield Finding("gloo", "missing", "torch has no gloo", "install a torch with distributed support")
    if torch.cuda.is_available():
        if dist.is_nccl_available():
            version = ".".join(str(part) for part in torch.cuda.nccl.version())
            yield Finding("NCCL", "ok", version)
        else:
            yield Finding("NCCL", "missing", "torch has no NCCL", "install a torch for CUDA on Linux")


def _deepspeed() -> Iterator[Finding]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        fit = [name for name in ("cpu_adam", "fused_adam", "async_io") if _is_compatible(ALL_OPS.get(name))]
        accelerator = get_accelerator().device_name()
    yield Finding("DeepSpeed", "ok", f"{deepspeed.__version__} on {accelerator}")
    # rcpo steps with torch's optimizers, so that nothing has to be compiled.
    seen = f"none is needed; {', '.join(fit) or 'none'} could be built"
    yield Finding("DeepSpeed ops", "ok", seen)


def _is_compatible(builder: object) -> bool:
    try:
        return builder is not None and bool(builder.is_compatible(verbose=False))  # type: ignore[attr-defined]
    except Exception:
        return False


def _compiler() -> Iterator[Finding]:
    found = [name for name in ("g++", "ninja", "nvcc") if shutil.which(name)]
    if "g++" in found:
        yield Finding("compiler", "ok", ", ".join(found))
    else:
        advice = "only for deepspeed.extra entries that compile: install g++ and ninja"
        yield Finding("compiler", "note", ", ".join(found) or "none", advice)


def _slurm() -> Iterator[Finding]:
    version = _said_by("sbatch", "--version")
    if version:
        yield Finding("SLURM", "ok", version)
    else:
        yield Finding("SLURM", "note", "no sbatch", "only for rcpo sweep --slurm: start it on a login node")


def _wandb() -> Iterator[Finding]:
    from rcpo.monitor.tracking import has_key

    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("offline", "dryrun", "disabled"):
        yield Finding("W&B", "note", f"WANDB_MODE={asked}", "unset WANDB_MODE to track online")
    elif has_key():
        yield Finding("W&B", "ok", "an API key is configured; runs are tracked online")
    else:
        advice = "wandb login, or send runs later with rcpo sync"
        yield Finding("W&B", "note", "no API key; runs are tracked offline", advice)


def _hugging_face() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    token = "with a token" if get_token() else "without a token (gated models need one: hf auth login)"
    if constants.HF_HUB_OFFLINE:
        advice = "unset HF_HUB_OFFLINE to download models and data"
        yield Finding("Hugging Face", "note", f"offline; cache {cache}", advice)
    else:
        yield Finding("Hugging Face", "ok", f"cache {cache}, {token}")


def _disk() -> Iterator[Finding]:
    """Room where runs, rcpo's cache and the hub's cache are, and whether they can be written."""
    from huggingface_hub import constants

    from rcpo.common.files import cache_dir

    places = {
        "runs": Path.cwd() / "runs",
        "rcpo's cache": cache_dir(),
        "models": Path(constants.HF_HUB_CACHE),
    }
    for name, place in places.items():
        there = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(there).free / GIB
        seen = f"{free:.0f} GiB free at {place}"
        key = {"runs": "type run_dir=FOLDER", "rcpo's cache": "set RCPO_CACHE"}.get(name, "set HF_HOME")
        if not there.is_dir() or not os.access(there, os.W_OK):
            yield Finding(f"disk: {name}", "missing", f"{there} cannot be written", key)
        elif free < NEEDED_DISK_GIB:
            yield Finding(
                f"disk: {name}", "missing", f"{free:.2f} GiB free at {place}", f"make room, or {key}"
            )
        elif free < COMFORTABLE_DISK_GIB:
            advice = f"a 7B model's checkpoint takes about 100 GiB: make room, or {key}"
            yield Finding(f"disk: {name}", "note", seen, advice)
        else:
            yield Finding(f"disk: {name}", "ok", seen)


def _shared_memory() -> Iterator[Finding]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return
    size = shutil.disk_usage(shm).total / GIB
    if size < COMFORTABLE_SHM_GIB:
        advice = "for several GPUs, start the container with --shm-size=16g or --ipc=host"
        yield Finding("/dev/shm", "note", f"{size * 1024:.0f} MiB", advice)
    else:
        yield Finding("/dev/shm", "ok", f"{size:.0f} GiB")


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own
    if limit.is_file() and limit.read_text().strip().isdecimal():
        total = min(total, int(limit.read_text()))
    seen = f"{total / GIB:.0f} GiB"
    if total < 4 * GIB:
        yield Finding("memory", "note", seen, "enough for the embedded model; others need more")
    else:
        yield Finding("memory", "ok", seen)


def _cores() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding("cores", "ok", f"{usable}" + (f", OMP_NUM_THREADS={threads}" if threads else ""))


def _said_by(*command: str) -> str:
    """What a program prints, without white space around; empty where it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python, _packages, _optional_packages, _gpus, _collectives, _deepspeed, _compiler, _slurm, _wandb,
    _hugging_face, _disk, _shared_memory, _memory, _cores,
)  # fmt: skip
