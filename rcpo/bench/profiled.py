"""One step under torch.profiler: what takes its time, how long the device idles, and where the host waits for
it. Called by `rcpo.bench.recorder`; told by `rcpo.bench.table`."""

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

TOP_ITEMS = 15
"""Rows of a profile that are shown."""
DEVICE_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""Calls with which the host waits for a GPU. The bench's own wait, at the end of a step, is another one."""
SCALAR_READS = ("aten::_local_scalar_dense",)
"""A tensor's number as Python's: on a GPU a wait, on a CPU what would be one."""


class StepProfile:
    """A profile from its making to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._on_gpu:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=kinds)
        self._profiler.start()
        self._started = time.perf_counter()

    def stop(self, trace: str | None) -> dict[str, Any]:
        """What there was, in plain values; with `trace` a Chrome trace is written there (.gz: packed)."""
        milliseconds = 1e3 * (time.perf_counter() - self._started)
        self._profiler.stop()
        if trace is not None:
            Path(trace).parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(trace)
        averages = self._profiler.key_averages()
        names = DEVICE_WAITS if self._on_gpu else SCALAR_READS
        counts = {item.key: item.count for item in averages if item.key in names}
        return {
            "milliseconds": milliseconds,
            "busy": self._busy(milliseconds) if self._on_gpu else None,
            "waits": counts,
            "items": largest(averages, "self_device_time_total" if self._on_gpu else "self_cpu_time_total"),
        }

    def _busy(self, milliseconds: float) -> float:
        """Share of the step in which a kernel or a copy ran on the device."""
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in self._profiler.events() or ()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        return covered(spans) / 1e3 / milliseconds


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans, which may overlap."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def largest(averages: Iterable[Any], kind: str) -> list[dict[str, Any]]:
    """The items that take most time themselves, largest first."""
    items = sorted(averages, key=lambda item: -getattr(item, kind))
    total = sum(getattr(item, kind) for item in items) or 1
    return [
        {
            "name": re.sub(r"\s+", " ", item.key),
            "milliseconds": getattr(item, kind) / 1e3,
            "calls": item.count,
            "share": getattr(item, kind) / total,
        }
        for item in items[:TOP_ITEMS]
    ]


def in_words(name: str, profile: dict[str, Any]) -> str:
    """One line: "one step of off under the profiler: 812 ms, the device busy 97 %; the host waited once"."""
    num_waits = sum(profile["waits"].values())
    if profile["busy"] is None:
        waits = f"scalars read from tensors, each of them a wait on a GPU: {num_waits}"
    else:
        times = "once" if num_waits == 1 else f"{num_waits} times"
        waits = f"the device busy {100 * profile['busy']:.0f} %, the host waited for it {times}"
    return f"one step of {name} under the profiler: {profile['milliseconds']:.0f} ms; {waits}"
