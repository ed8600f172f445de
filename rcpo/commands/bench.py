"""`rcpo bench [GROUP=OPTION] [KEY=VALUE]... [--flags]`: how fast training is, and what calibration costs."""

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcpo.commands.flags import Flags, add_config_words, positive_int
from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.bench.plan import Options

SHAPE = {"hidden": 256, "intermediate": 688, "layers": 4, "heads": 4, "vocabulary": 49152}
IMAGES = {"side": 336, "patch": 14, "hidden": 320, "layers": 8, "heads": 5}
LENGTHS = {"prompt": 120, "response": 60, "spread": 0}


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Train a few steps in blocks, each in a process of its own, one contender after the other and again:
pairs and tokens a second, peak memory, where the time goes, and the ratio to the first contender.
Words are those of `rcpo train`."""
    parser.epilog = """\
examples:
  rcpo bench --calibrations off,on --steps 10
  rcpo bench --shape layers=2 --lengths prompt=120,response=60 --baseline plain
  rcpo bench --images side=336 --baseline trl,twice model.vision=train objective=dpo
  rcpo bench model.path=MODEL --variant train.packing=true --json bench.json"""
    add_config_words(parser)
    _add_contenders(parser)
    _add_work(parser)
    _add_outputs(parser)


def _add_contenders(parser: Flags) -> None:
    add = parser.add_argument
    add(
        "--calibrations",
        type=_names,
        default=["off", "on", "exact"],
        metavar="A,B",
        help="contenders: rcpo with each of these (default: off,on,exact)",
    )
    add(
        "--variant",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one more contender: the first calibration with this word; may be given several times",
    )
    add(
        "--baseline",
        type=_names,
        action="append",
        default=[],
        metavar="plain|response|trl|twice",
        help="one more contender: torch with full logits, torch with logits of response positions, TRL's "
        "DPOTrainer where installed, or with --images rcpo that encodes an image for each side of its pair; "
        "may be given several times. Loss and gradient of the first step must "
        "agree, or nothing is compared",
    )


def _add_work(parser: Flags) -> None:
    add = parser.add_argument
    add("--steps", type=positive_int, default=5, metavar="N", help="timed steps of a block (default: 5)")
    add("--warmup", type=positive_int, default=1, metavar="N", help="steps before those (default: 1)")
    add("--repeats", type=positive_int, default=3, metavar="N", help="rounds (default: 3)")
    add(
        "--shape",
        type=lambda text: _sizes(text, SHAPE),
        metavar="NAME=N,...",
        help="a random Llama in place of weights: hidden, intermediate, layers, heads, vocabulary (in parts; "
        "the rest is 256, 688, 4, 4, 49152), with the tokenizer of model.path",
    )
    add(
        "--lengths",
        type=lambda text: _sizes(text, LENGTHS),
        metavar="NAME=N,...",
        help="random tokens in place of data: prompt, response (in parts; the rest is 120, 60), and spread, "
        "100 times the standard deviation of a length's logarithm around these medians (0: all alike)",
    )

    add(
        "--images",
        type=lambda text: _sizes(text, IMAGES),
        metavar="NAME=N,...",
        help="a random Llava and pictures of 640 x 480 pixels in place of weights and data; of its tower "
        "side (pixels), patch, hidden, layers, heads (in parts; the rest is 336, 14, 320, 8, 5). --shape and "
        "--lengths are of its text",
    )


def _add_outputs(parser: Flags) -> None:
    add = parser.add_argument
    add("--json", metavar="FILE", help="write everything there, each block's numbers included")
    add(
        "--profile",
        metavar="FILE",
        help="one more block of the first contender, its last step as a Chrome trace",
    )
    add(
        "--gpu",
        metavar="FILE.md",
        help="what one GPU does, written as Markdown: a 1B model in bf16 at fixed and at varied lengths, "
        "calibrations, micro-batches, layouts, kernels, baselines, adapters on 9B, two steps under the "
        "profiler, with their traces; other flags but --minutes and --rehearse have no effect",
    )
    add(
        "--rehearse",
        action="store_true",
        help="with --gpu: the same sections with tiny models, on whatever device is here, to see the page",
    )
    add(
        "--minutes",
        type=positive_int,
        default=30,
        metavar="N",
        help="with --gpu: no section begins after so long (default: 30)",
    )
    add(
        "--no-shares",
        action="store_true",
        help="leave out the extra block of each contender that tells where time goes",
    )
    add(
        "--head-curve",
        action="store_true",
        help="only the memory of the output head against the number of tokens",
    )


def _look_at(words: Sequence[str]) -> None:
    """Raise UserError for what can be told of the words before torch is loaded."""
    from rcpo.config.compose import compose
    from rcpo.launch.first_look import look_at_inputs

    tree = compose(list(words))
    if tree is not None:
        look_at_inputs(tree)


def run(flags: argparse.Namespace) -> int:
    """Run the bench; returns the exit code. Raises UserError for bad input."""
    if flags.head_curve:
        _print_curve(flags.shape or SHAPE)
        return 0
    if flags.gpu is not None:
        return _run_on_gpu(Path(flags.gpu), flags.minutes, flags.rehearse)
    _look_at(flags.words)
    options = options_of(flags)
    from rcpo.bench.machine import machine_facts
    from rcpo.bench.plan import run_bench
    from rcpo.bench.table import as_json, remarks, tables
    from rcpo.common.console import RunConsole

    console = RunConsole()
    if not console.is_terminal:
        console.width = 200

    def say(line: str) -> None:
        console.print(line, style="dim", soft_wrap=True, highlight=False)

    with tempfile.TemporaryDirectory(prefix="rcpo-bench-") as folder:
        outcome = run_bench(options, Path(folder), say)
    console.print(tables(outcome, console))
    for line in remarks(outcome):
        console.print(line, soft_wrap=True, highlight=False)
    if flags.json is not None:
        found = as_json(outcome, machine_facts(), f"rcpo bench {shlex.join(flags.typed)}")
        _write(flags.json, json.dumps(found, indent=2) + "\n")
    return 0


def _run_on_gpu(file: Path, minutes: int, is_rehearsal: bool) -> int:
    """All sections; the file grows with each. Returns 1 where one failed."""
    import torch

    from rcpo.bench.gpu import SECTIONS, rehearsed, run_sections
    from rcpo.commands.parser import command_parser

    if not torch.cuda.is_available() and not is_rehearsal:
        raise UserError(
            f"--gpu {file}: no CUDA device here; run it where one is, or type --rehearse for the same with "
            "tiny models"
        )
    if not file.absolute().parent.is_dir():
        raise UserError(f"--gpu {file}: its folder is not there; give a file in one that is")
    sections = map(rehearsed, SECTIONS) if is_rehearsal else SECTIONS
    planned = [(each, options_of(command_parser("bench").parse(list(each.words)))) for each in sections]
    return 0 if run_sections(planned, file, 60.0 * minutes, print) else 1


def options_of(flags: argparse.Namespace) -> "Options":
    """What `rcpo.bench.plan` is asked for."""
    from rcpo.bench.plan import BASELINES, Options

    baselines = [name for names in flags.baseline for name in names]
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise UserError(f"--baseline {unknown[0]}: no such baseline; choose of {', '.join(BASELINES)}")
    for name in ("json", "profile"):
        target = getattr(flags, name)
        if target is not None and not Path(target).absolute().parent.is_dir():
            raise UserError(f"--{name} {target}: its folder is not there; give a file in one that is")
    if flags.shape is not None and flags.shape["hidden"] % (2 * flags.shape["heads"]):
        raise UserError(
            f"--shape hidden={flags.shape['hidden']},heads={flags.shape['heads']}: hidden must be a multiple "
            "of twice the heads; type another"
        )
    of_others = ("twice",) if flags.images is None else ("plain", "response")
    if found := [name for name in baselines if name in of_others]:
        what, way = ("images", "add") if flags.images is None else ("text", "leave out")
        raise UserError(f"--baseline {found[0]}: is of {what} alone; leave it out, or {way} --images")
    if flags.images is not None:
        _check_images(flags)
    return Options(
        words=[*flags.hydra, *flags.words],
        calibrations=list(dict.fromkeys(flags.calibrations)),
        baselines=list(dict.fromkeys(baselines)),
        variants=[shlex.split(text) for text in flags.variant],
        repeats=flags.repeats,
        num_steps=flags.steps,
        num_warmup=flags.warmup,
        shape=flags.shape if flags.images is None else flags.shape or SHAPE,
        lengths=flags.lengths if flags.images is None else flags.lengths or LENGTHS,
        images=flags.images,
        trace=None if flags.profile is None else str(Path(flags.profile).absolute()),
        shares=not flags.no_shares,
    )


def _check_images(flags: argparse.Namespace) -> None:
    """Raise UserError for sizes that make no model."""
    side, patch, hidden, heads = (flags.images[name] for name in ("side", "patch", "hidden", "heads"))
    if side % patch or hidden % heads:
        raise UserError(
            f"--images side={side},patch={patch},hidden={hidden},heads={heads}: side must be a multiple of "
            "patch, and hidden of heads; type another"
        )
    if flags.lengths is not None and flags.lengths["spread"]:
        raise UserError("--lengths spread: answers to images are all of one length; leave it out")
    if flags.shape is not None and flags.shape["vocabulary"] < FEWEST_WORDS:
        raise UserError(f"--shape vocabulary: must be at least {FEWEST_WORDS} with --images; type another")


FEWEST_WORDS = 16


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text}: must be names with commas between them")
    return names


def _sizes(text: str, defaults: dict[str, int]) -> dict[str, int]:
    """NAME=NUMBER,... over the defaults."""
    sizes = dict(defaults)
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in defaults or not value.isdecimal() or int(value) < 1:
            raise argparse.ArgumentTypeError(
                f"{part}: must be one of {', '.join(f'{key}=N' for key in defaults)} with N at least 1"
            )
        sizes[name] = int(value)
    return sizes


def _print_curve(shape: dict[str, int]) -> None:
    import torch
    from rich import box
    from rich.table import Table

    from rcpo.bench.curve import head_curve
    from rcpo.common.console import RunConsole

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = RunConsole()
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN)
    for title in ("response tokens", "rcpo's head (GB)", "full logits (GB)"):
        table.add_column(title, justify="right", no_wrap=True)
    for point in head_curve(shape["vocabulary"], shape["hidden"], device):
        full = "not tried" if point.full_gb is None else f"{point.full_gb:.2f}"
        table.add_row(str(point.num_tokens), f"{point.chunked_gb:.2f}", full)
    console.print(table)
    console.print(
        f"peak of forward and backward above weights, hidden states and the weights' gradient; "
        f"vocabulary {shape['vocabulary']}, hidden {shape['hidden']}, fp32",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}); give another file") from None
