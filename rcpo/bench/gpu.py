"""`rcpo bench --gpu FILE.md`: what one GPU does, in half an hour, as a page of Markdown.

Sections are benches as users type them, most important first. Each is written when it is done, so that a
machine that is taken away leaves what it has measured. A section that fails is reported as such, and the
others go on. Speed is given as a share of a matrix product measured on the same device (MFU). Called by
`rcpo.commands.bench`.
"""

import dataclasses
import importlib.util
import shlex
import tempfile
import time
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from rcpo.bench.machine import machine_facts
from rcpo.bench.plan import Options, Outcome, Say, run_bench
from rcpo.bench.table import remarks, speeds, tables

ONE_B = "hidden=2048,intermediate=8192,layers=16,heads=16,vocabulary=128256"
"""1.5 billion parameters, as wide and as deep as Llama-3.2-1B, with that vocabulary."""
NINE_B = "hidden=4096,intermediate=14336,layers=32,heads=32,vocabulary=128256"
"""9 billion parameters: Llama-3-8B's, with keys of as many heads as queries."""
BF16 = ("model.dtype=bfloat16", "objective=dpo", "train.pairs_per_step=32", "optim.lr=1e-6")
FIXED = ("--lengths", "prompt=512,response=512")
VARIED = ("--lengths", "prompt=130,response=260,spread=60", "train.max_length=2048")
"""As spread as UltraFeedback's."""
ALL = ("--calibrations", "off,on,exact")
QUICK = ("--steps", "4", "--repeats", "2")
ONCE = ("--steps", "4", "--repeats", "1", "--no-shares")
"""Where contenders are far apart, or the first section has told where time goes."""


class Section(NamedTuple):
    title: str
    words: tuple[str, ...]
    """Of `rcpo bench`."""
    profiled: bool = False
    """Whether a step of the first contender is profiled, its trace beside the page."""
    needs: tuple[str, str] | None = None
    """A module that is optional, and the extra of rcpo that brings it."""


SECTIONS = (
    Section(
        "1B, 512 + 512 tokens: what calibration costs",
        ("--shape", ONE_B, *FIXED, *QUICK, *BF16, "train.pairs_per_device=4", *ALL),
        profiled=True,
    ),
    Section(
        "1B, 512 + 512 tokens: a step of exact",
        (
            "--shape", ONE_B, *FIXED, "--steps", "2", "--repeats", "1", "--no-shares", *BF16,
            "train.pairs_per_device=4", "--calibrations", "exact",  # of the two, the last is measured
        ),
        profiled=True,
    ),
    Section(
        "1B, 512 + 512 tokens: micro-batches and recomputation",
        (
            "--shape", ONE_B, *FIXED, *ONCE, *BF16, "train.pairs_per_device=4", "--calibrations", "off",
            "--variant", "train.pairs_per_device=1", "--variant", "train.pairs_per_device=8",
            "--variant", "train.pairs_per_device=8 model.gradient_checkpointing=true",
        ),
    ),
    Section(
        "1B, 512 + 512 tokens: plain loops with fp32 weights under autocast",
        (
            "--shape", ONE_B, *FIXED, *ONCE, *BF16, "train.pairs_per_device=2", "--calibrations", "off",
            "--baseline", "plain,response",
        ),
    ),
    Section(
        "1B, 512 + 512 tokens: TRL",
        (
            "--shape", ONE_B, *FIXED, *ONCE, *BF16, "train.pairs_per_device=2", "--calibrations", "off",
            "--baseline", "trl",
        ),
        needs=("trl", "bench"),
    ),
    Section(
        "1B, lengths as of UltraFeedback: shared prompts",
        (
            "--shape", ONE_B, *VARIED, *ONCE, *BF16, "train.pairs_per_device=4", *ALL,
            "--variant", "train.share_prefix=true",
            "--variant", "train.share_prefix=true model.attention=flex_attention",
        ),
    ),
    Section(
        "1B, lengths as of UltraFeedback: packing",
        (
            "--shape", ONE_B, *VARIED, *ONCE, *BF16, "train.pairs_per_device=4", "--calibrations", "off",
            "--variant", "train.packing=true model.attention=varlen",
        ),
    ),
    Section(
        "9B, LoRA",
        (
            "--shape", NINE_B, *FIXED, "--steps", "2", "--repeats", "1", "--no-shares", *BF16,
            "train.pairs_per_device=2", "model.lora.rank=16", "model.gradient_checkpointing=true",
            "--calibrations", "off,on",
        ),
    ),
    Section(
        "9B, QLoRA",
        (
            "--shape", NINE_B, *FIXED, "--steps", "2", "--repeats", "1", "--no-shares", *BF16,
            "train.pairs_per_device=2", "model.lora.rank=16", "model.lora.save=adapter",
            "model.quantization=4bit", "model.gradient_checkpointing=true", "--calibrations", "off",
        ),
        needs=("bitsandbytes", "quantization"),
    ),
    Section(
        "1B, 512 + 512 tokens: layers of Liger",
        (
            "--shape", ONE_B, *FIXED, *ONCE, *BF16, "train.pairs_per_device=4", "--calibrations", "off",
            "--variant", "model.kernels=liger",
        ),
        needs=("liger_kernel", "liger"),
    ),
    Section(
        "1B, 512 + 512 tokens: compiled layers",
        (
            "--shape", ONE_B, *FIXED, *ONCE, *BF16, "train.pairs_per_device=4", "--calibrations", "off",
            "--variant", "model.compile=true",
        ),
    ),
)  # fmt: skip


TINY = {
    ONE_B: "hidden=32,intermediate=64,layers=2,heads=2,vocabulary=512",
    NINE_B: "hidden=64,intermediate=64,layers=2,heads=2,vocabulary=512",
    FIXED[1]: "prompt=12,response=8", VARIED[1]: "prompt=5,response=10,spread=60",
    "train.max_length=2048": "train.max_length=128", "train.pairs_per_step=32": "train.pairs_per_step=8",
    "train.share_prefix=true model.attention=flex_attention":
        "train.share_prefix=true model.attention=eager",
    "train.packing=true model.attention=varlen": "train.packing=true model.attention=sdpa",
    "model.kernels=liger": "model.attention=sdpa", "model.compile=true": "model.attention=sdpa",
}  # fmt: skip
"""What a rehearsal has in place of words: no size and no kernel that a CPU lacks."""


def rehearsed(section: Section) -> Section:
    """The same section of tiny models, two steps a block, of which the last is measured, and one round:
    minutes on a CPU."""
    words = [TINY.get(word, word) for word in section.words]
    for flag, number in (("--steps", "2"), ("--repeats", "1")):
        words[words.index(flag) + 1] = number
    title = f"{section.title} (rehearsed with a tiny model)"
    needs = None if section.needs is not None and section.needs[0] == "liger_kernel" else section.needs
    return section._replace(title=title, words=tuple(words), needs=needs)


def run_sections(planned: Iterable[tuple[Section, Options]], file: Path, seconds: float, say: Say) -> bool:
    """Run what there is time for, and write `file` after each; returns whether none failed."""
    started, passed = time.monotonic(), True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attained = matmul_tflops(device)
    parts = [_head(attained)]
    for number, (section, options) in enumerate(planned, 1):
        trace = file.with_suffix(f".{number}.trace.json.gz") if section.profiled else None
        words = [*section.words, *([] if trace is None else ["--profile", trace.name])]
        command = f"rcpo bench {shlex.join(words)}"
        if trace is not None:
            options = dataclasses.replace(options, trace=str(trace.absolute()))
        part = [f"## {section.title}", f"```sh\n{command}\n```"]
        if time.monotonic() - started > seconds:
            part.append(f"Not run: {seconds / 60:.0f} minutes were over.")
        elif section.needs is not None and importlib.util.find_spec(section.needs[0]) is None:
            name, extra = section.needs
            part.append(f"Not run: {name} is not installed; type pip install 'rcpo[{extra}]'.")
        else:
            say(f"{section.title}: {command}")
            try:
                with tempfile.TemporaryDirectory(prefix="rcpo-bench-") as folder:
                    outcome = run_bench(options, Path(folder), say)
                part += [_table(outcome), *remarks(outcome), _shares_of_product(outcome, attained)]
                if trace is not None:
                    part.append(f"The trace of that step: [{trace.name}]({trace.name}), for Perfetto.")
            # Whatever one section fails of, the others are worth having.
            except Exception as error:
                passed = False
                part.append(f"Failed: {' '.join(f'{type(error).__name__}: {error}'.split())[:400]}")
        parts.append("\n\n".join(part))
        file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return passed


def matmul_tflops(device: torch.device, size: int = 8192, seconds: float = 1.0) -> float:
    """10^12 operations a second of a bf16 product of two random matrices (size, size), over about `seconds`:
    what the device attains. On a CPU the matrices are small."""
    size = size if device.type == "cuda" else min(size, 256)
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))

    def took(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    took(3)
    times = max(3, int(seconds / max(took(3) / 3, 1e-6)))
    return 2e-12 * size**3 * times / took(times)


def _head(attained: float) -> str:
    facts = machine_facts()
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"# Measured on {facts['gpu'] or facts['processor']}\n\n"
        f"{facts['date']}; {facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GB; "
        f"{versions}; commit {facts['git_commit']}.\n\n"
        f"A bf16 matrix product attains {attained:.3g} TFLOP/s here.\n\n{COLUMNS}"
    )


COLUMNS = """\
- **computed**: tokens that went through the model over tokens of the data; above 1 is padding, below 1
  shared prompts.
- **peak GB**: the most that torch held on the GPU; on a CPU the most of the whole process.
- **MFU**, or **TFLOP/s**: of what the work asks for, recomputation not counted. MFU is over the GPU's data
  sheet where that is known; *MFU of product* is over the matrix product above.
- **speed over**: pairs a second over the first line's, with its range where there was more than one round.
- **by CPU time**: the same ratio by the processor's time. It counts where cores are shared; on a GPU it tells
  what the host does.
- **share of time**: an extra pass with a timer around each part."""


def _table(outcome: Outcome) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(tables(outcome, console))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in written.strip().splitlines())


def _shares_of_product(outcome: Outcome, attained: float) -> str:
    shares = (
        f"{name} {100 * speed.tflops / outcome.contenders[0].config.world_size() / attained:.1f} %"
        for name, speed in speeds(outcome).items()
    )
    return f"MFU of product: {', '.join(shares)}."
