"""What this machine is, and what a step asks of it in floating-point operations."""

import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import rcpo
from rcpo.bench.work import num_response_tokens, num_tokens
from rcpo.common.code_version import git_commit
from rcpo.data.tokenize import TokenizedPair

PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "GH200": 989,
    "A100": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A6000": 155, "RTX 4090": 165,
    "RTX 3090": 71, "MI300X": 1307,
}  # fmt: skip
"""Dense bf16 peak with fp32 accumulation, 10^12 operations a second, from the makers' data sheets; the first
name that the device's contains counts."""
LIBRARIES = ("torch", "transformers", "deepspeed", "trl", "peft")


def peak_tflops(gpu: str | None) -> float | None:
    """Of a GPU by its name; None for one that is not in the table and for CPUs."""
    if gpu is None:
        return None
    return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in gpu), None)


def model_flops(pairs: list[TokenizedPair], model: dict[str, Any]) -> float:
    """Operations that training on these pairs asks for: forward and backward of both sides.

    Per token 2 P of the body's weights and 2 T H L of causal attention, per response token 2 V H of the head,
    times 3 for the backward pass (2 where only adapters train). Padding, recomputation and prompts that are
    shared do not change it: it is what the work asks for, not what is done.
    """
    body = 2.0 * model["body_parameters"] * num_tokens(pairs)
    lengths = [len(side.input_ids) for pair in pairs for side in (pair.chosen, pair.rejected)]
    attention = 2.0 * model["hidden"] * model["layers"] * sum(length**2 for length in lengths)
    head = 2.0 * model["vocabulary"] * model["hidden"] * num_response_tokens(pairs)
    return (3 if model["trains_all"] else 2) * (body + attention + head)


def machine_facts() -> dict[str, Any]:
    """Processor, memory, GPU, system and versions of what matters; no name of the machine."""
    versions = {"rcpo": rcpo.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "git_commit": git_commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found is not None else platform.processor() or platform.machine()
