"""Which blocks a bench runs, in which order, and what must agree before they are compared.

Owns the work folder and the blocks' processes. A round runs every contender once, and rounds are repeated, so
that a machine that slows down slows all of them. Called by `rcpo.commands.bench`.
"""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcpo.bench.images import write_work
from rcpo.bench.work import LONGEST, PAIRS, Block, Mode, random_pairs, save_pairs, write_model
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.validate import validate
from rcpo.data.tokenize import TokenizedPair
from rcpo.models.checks import check_positions, check_vocabulary
from rcpo.models.evaluation import eval_batch
from rcpo.models.load import load_tokenizer
from rcpo.ranks.distributed import free_port
from rcpo.ranks.environment import RANK_VARIABLES
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree
from rcpo.training.read_inputs import read_inputs

BASELINES = ("plain", "response", "trl", "twice")
FIXED = ("tracking=none", "train.eval_every=0", "train.save_every=0")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference of losses, and of gradients over the gradient's norm, that rounding explains."""
MEASURED_EVERY = 2
"""Where a calibration measures every k steps, a bench of a few steps measures every second one and weighs the
two kinds of steps as the run would."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    words: list[str]
    calibrations: list[str]
    baselines: list[str]
    variants: list[list[str]]
    """Further contenders: the first calibration with these words."""
    repeats: int
    num_steps: int
    num_warmup: int
    shape: dict[str, int] | None
    lengths: dict[str, int] | None
    trace: str | None = None
    images: dict[str, int] | None = None
    """A random Llava and pictures in place of a Llama and random tokens."""
    shares: bool = True
    """Whether an extra block of each of rcpo's contenders tells where time goes."""


@dataclass(frozen=True)
class Contender:
    """What is compared: rcpo in one configuration, or a baseline."""

    name: str
    program: str
    """rcpo, plain, response, trl or twice."""
    config: ResolvedConfig
    every: int = 1
    """One of so many of the run's steps is measured."""


@dataclass
class Outcome:
    """What all blocks have found."""

    contenders: list[Contender]
    pairs: list[TokenizedPair]
    batches: list[list[int]]
    """Of the timed steps."""
    reference: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, dict[str, float]] = field(default_factory=dict)
    blocks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    """Of one step of the first contender (`rcpo.bench.profiled`); empty where none was asked for."""


def run_bench(options: Options, folder: Path, say: Say) -> Outcome:
    """Run all blocks in `folder`. Raises UserError for bad input, and where a baseline computes something
    else."""
    bench = _Bench(options, folder, say)
    outcome = bench.outcome
    outcome.reference = bench.run(outcome.contenders[0], "reference")
    if options.baselines:
        bench.check()
    for repeat in range(options.repeats):
        for contender in outcome.contenders:
            result = bench.run(contender, "time", f"round {repeat + 1} of {options.repeats}")
            outcome.blocks.setdefault(contender.name, []).append(result)
    for contender in outcome.contenders:
        if options.shares and contender.program == "rcpo":
            outcome.shares[contender.name] = bench.run(contender, "shares")["shares"]
    if options.trace is not None:
        outcome.profile = bench.run(outcome.contenders[0], "profile")["profile"]
    return outcome


class _Bench:
    """A work folder and the blocks that run on it."""

    def __init__(self, options: Options, folder: Path, say: Say) -> None:
        self._options, self._folder, self._say = options, folder, say
        self._num_blocks = 0
        words = [*options.words, *FIXED, f"train.steps={options.num_warmup + options.num_steps}"]
        if options.images is not None:
            words = [*_write_images(options, folder), *words]
        config = _resolved(words)
        if options.shape is not None and options.images is None:
            write_model(options.shape, config, folder / "model")
            words.append(f"model.path={folder / 'model'}")
            config = _resolved(words)
        contenders = _contenders(options, words)
        if options.baselines and config.world_size() > 1:
            raise UserError("--baseline: baselines run on one rank; leave it out, or type launch.processes=1")
        if options.lengths is None or options.images is not None:
            inputs = read_inputs(config)
            if inputs.train.slots > 1:
                raise UserError(
                    "data.lists=whole: lists of responses have no bench; type data.lists=best_worst and an "
                    "objective of pairs"
                )
            pairs = list(inputs.train)
        else:
            tokenizer = load_tokenizer(config.model)
            check_vocabulary(config.model, tokenizer)
            vocabulary = len(tokenizer) if options.shape is None else options.shape["vocabulary"]
            longest = LONGEST if options.lengths["spread"] else 1
            num_tokens = longest * (options.lengths["prompt"] + options.lengths["response"])
            check_positions(config.model, num_tokens)
            num_pairs = (options.num_warmup + options.num_steps) * config.train.pairs_per_step
            prompt, response, spread = (options.lengths[name] for name in ("prompt", "response", "spread"))
            pairs = random_pairs(num_pairs, prompt, response, vocabulary, spread)
        if options.images is None:
            save_pairs(pairs, folder / PAIRS)
        batches = _batches(config, pairs, options)
        self.outcome = Outcome(contenders, pairs, batches)

    def run(self, contender: Contender, mode: Mode, note: str = "") -> dict[str, Any]:
        """One block, from its start to its result."""
        self._num_blocks += 1
        self._say(f"{contender.name}: {mode}{f', {note}' if note else ''}")
        place = self._folder / f"block-{self._num_blocks}"
        run = RunFolder(place / "run")
        config = dataclasses.replace(contender.config, run_dir=str(run.path))
        run.create(config, config_tree(config))
        block = Block(
            contender.program, mode, str(self._folder), str(run.path), str(place / "result.json"),
            0 if mode == "check" else self._options.num_warmup,
            1 if mode == "check" else self._options.num_steps,
            trace=self._options.trace if mode == "profile" else None,
        )  # fmt: skip
        block.save(place / "block.json")
        _run_processes(place / "block.json", config.world_size())
        found: dict[str, Any] = json.loads(Path(block.result).read_text(encoding="utf-8"))
        return found

    def check(self) -> None:
        """Raise UserError unless rcpo, its variants and the baselines have the same loss and gradient at the
        first step."""
        outcome = self.outcome
        first = outcome.contenders[0]
        ours = self.run(first, "check")
        for contender in outcome.contenders[1:]:
            if contender.config.calibration != first.config.calibration:
                continue  # is to train otherwise
            theirs = self.run(contender, "check")
            difference = compare_first_steps(ours, theirs)
            outcome.checks[contender.name] = difference
            worst, limit = max(difference.values()), TOLERANCE[str(first.config.model.dtype)]
            if not worst <= limit:
                raise UserError(
                    f"{contender.name}: its first step is not that of {first.name}: "
                    f"{', '.join(f'{what} differs by {value:.2g}' for what, value in difference.items())} "
                    f"(tolerance {limit:g}); nothing is compared"
                )


def compare_first_steps(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Differences of the loss, and of norms and random products of the gradient of each parameter over its
    norm (or a thousandth of the whole gradient's, where that is more)."""
    if set(ours["gradient"]) != set(theirs["gradient"]):
        return {"loss": abs(ours["losses"][0] - theirs["losses"][0]), "gradient": float("inf")}
    whole = sum(values[0] ** 2 for values in ours["gradient"].values()) ** 0.5
    worst = 0.0
    for name, values in ours["gradient"].items():
        scale = max(values[0], 1e-3 * whole) or 1.0
        worst = max(
            worst,
            *(abs(a - b) / scale for a, b in zip(values, theirs["gradient"][name], strict=True)),
        )
    return {"loss": abs(ours["losses"][0] - theirs["losses"][0]), "gradient": worst}


def _resolved(words: list[str]) -> ResolvedConfig:
    tree = compose(words)
    assert tree is not None
    config = resolve(validate(tree), None)
    # All blocks read one table of log-probs, whatever a pair is beside in their micro-batches.
    size = config.reference.pairs_per_device or eval_batch(config)
    return dataclasses.replace(config, reference=dataclasses.replace(config.reference, pairs_per_device=size))


def _contenders(options: Options, words: list[str]) -> list[Contender]:
    """rcpo with each calibration, its variants, and the baselines."""
    named = [(name, [f"calibration={name}"]) for name in options.calibrations]
    base = [f"calibration={options.calibrations[0]}"]
    for variant in options.variants:
        named.append((f"{options.calibrations[0]} {' '.join(variant)}", [*base, *variant]))
    contenders = []
    for name, own in named:
        config = _resolved([*words, *own])
        every = config.calibration.every
        if every > 1:
            calibration = dataclasses.replace(config.calibration, every=MEASURED_EVERY, warmup_steps=0)
            config = dataclasses.replace(config, calibration=calibration)
        contenders.append(Contender(name, "rcpo", config, every))
    objective = contenders[0].config.objective_function
    for name in options.baselines:
        if objective.needs_mismatched:
            raise UserError(
                f"--baseline {name}: does not score the mismatched pairs that objective={objective.name} "
                "needs; leave it out, or take another objective"
            )
        if objective.match is not None:
            raise UserError(
                f"--baseline {name}: does not see the whole batch, whose ranks objective={objective.name} "
                "compares; leave it out, or take another objective"
            )
        if objective.needs_mean_tokens:
            raise UserError(
                f"--baseline {name}: does not know the tokens of the whole batch, which "
                "objective.sft_mean=tokens divides by; leave it out, or type objective.sft_mean=pairs"
            )
        if objective.reads_tokens and not objective.weighs_tokens:
            raise UserError(
                f"--baseline {name}: has sums of the responses' log-probs alone; leave it out, or type "
                "objective.ld_alpha=1, objective.wpo=false and objective.sft_of=response"
            )
        if name == "trl":
            if importlib.util.find_spec("trl") is None:
                raise UserError(
                    "--baseline trl: TRL is not installed; type pip install 'rcpo[bench]', or leave it out"
                )
            from rcpo.bench.trl_loop import refuse

            refuse(contenders[0].config.objective["name"])
        contenders.append(Contender(name, name, contenders[0].config))
    return contenders


def _write_images(options: Options, folder: Path) -> list[str]:
    """Model, pictures and rows of `options.images`; returns the words for them."""
    assert options.images is not None
    assert options.shape is not None
    assert options.lengths is not None
    given = [word for word in options.words if word.split("=")[0] in ("model", "model.path", "data")]
    if given:
        raise UserError(f"{given[0]}: --images makes model and data itself; leave one of them out")
    settings = _resolved([*options.words, *FIXED]).train
    num_pairs = (options.num_warmup + options.num_steps) * settings.pairs_per_step
    return write_work(options.images, options.shape, options.lengths, num_pairs, folder)


def _batches(config: ResolvedConfig, pairs: list[TokenizedPair], options: Options) -> list[list[int]]:
    from rcpo.data.sampler import PairSampler

    sampler = PairSampler(len(pairs), config.train.pairs_per_step, config.seed)
    last = options.num_warmup + options.num_steps
    return [sampler.global_batch(step) for step in range(options.num_warmup, last)]


def _run_processes(block: Path, num_ranks: int) -> None:
    """One process a rank, all ended when one fails. Raises UserError for bad input, else RuntimeError with
    the last line that the process said."""
    command = [sys.executable, "-m", "rcpo.bench.block", str(block)]
    shared = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    logs = [block.with_name(f"rank-{number}.log") for number in range(num_ranks)]
    processes = []
    port = str(free_port())
    for number, log in enumerate(logs):
        own = {}
        if num_ranks > 1:
            values = (str(number), str(num_ranks), str(number), "127.0.0.1", port)
            own = dict(zip(RANK_VARIABLES, values, strict=True))
        with log.open("wb") as stream:
            processes.append(
                subprocess.Popen(
                    command,
                    env=os.environ | shared | own,
                    stdin=subprocess.PIPE,  # never written: its end tells the block that this process died
                    stdout=stream,
                    stderr=stream,
                )
            )
    try:
        while not all(process.poll() == 0 for process in processes):
            failed = [number for number, process in enumerate(processes) if process.poll()]
            if failed:
                raise _fault(processes[failed[0]].returncode, logs[failed[0]])
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _fault(code: int, log: Path) -> Exception:
    """What a block's process ended of: its last line; a UserError where it was one (`rcpo.common.errors`)."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code < 0:
        return RuntimeError(f"a block was ended by {signal.Signals(-code).name}; too little memory, perhaps")
    last = lines[-1] if lines else f"a block ended with exit code {code}"
    return UserError(last) if code > 1 else RuntimeError(last)
