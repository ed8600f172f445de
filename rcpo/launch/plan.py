"""What a run would do, before it does: `rcpo train ... --plan`, and `--cfg job --resolve`.

Owns the lines of the plan: what is decided, and by whom. Everything is checked and read as for a run, and
nothing is written: neither a run folder nor a cache. Called by `rcpo.commands.train`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import yaml

from rcpo.common.conf import conf_dir, option_tree
from rcpo.common.console import percent
from rcpo.common.errors import UserError
from rcpo.config.compose import Composition, config_dirs, look_at
from rcpo.config.meanings import leaves, option_file, shown
from rcpo.config.names import BUILTIN
from rcpo.config.resolve import resolve
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.validate import validate
from rcpo.data.inputs import Inputs
from rcpo.engine.memory import in_words, live_reference_bytes, memory_budget
from rcpo.engine.memory import shown as in_bytes
from rcpo.launch.stage import with_stage
from rcpo.models.checks import shapes_of
from rcpo.monitor.tracking import wandb_mode
from rcpo.records.held_out_split import with_held_out_split
from rcpo.reference.weights import has_own_weights
from rcpo.training.read_inputs import read_inputs


class Line(NamedTuple):
    """One thing that is decided."""

    what: str
    """The key that decides it, where there is one."""
    value: str
    origin: str
    """Who decided: a word, an option's file, or rcpo, by which rule."""


def plan_lines(argv: list[str], tree: dict[str, Any]) -> list[Line]:
    """What the run of these words, composed to `tree`, would do. Raises UserError for what the run would
    refuse."""
    asked = resolve(validate(tree), None)
    data, _ = with_held_out_split(asked.data)
    asked = dataclasses.replace(asked, data=data)
    inputs = read_inputs(asked, keep=False)
    config = with_stage(asked, inputs)
    return list(_lines(config, inputs, Origins(argv)))


def resolved_text(argv: list[str], tree: dict[str, Any]) -> str:
    """The resolved config as YAML, with a comment behind every value that rcpo has decided. What takes data
    or GPUs to know is null still."""
    from rcpo.runs.frozen import config_tree

    before = dict(leaves(tree, ""))
    text = []
    path: list[str] = []
    for line in yaml.safe_dump(config_tree(resolve(validate(tree), None)), sort_keys=False).splitlines():
        name, colon, value = line.strip().partition(":")
        depth = (len(line) - len(line.lstrip())) // 2
        path = [*path[:depth], name]
        is_null = before.get(".".join(path), "") is None
        text.append(f"{line}  # by rcpo" if colon and is_null and value.strip() != "null" else line)
    return "\n".join(_package_of(argv, text))


def _package_of(argv: list[str], lines: list[str]) -> list[str]:
    """The lines of the group that --package names; all of them without it."""
    flag = next((number for number, word in enumerate(argv) if word in ("--package", "-p")), None)
    if flag is None:
        return lines
    group = argv[flag + 1]
    if f"{group}:" not in lines:
        raise UserError(f"--package {group}: is no group of the config; `rcpo train --help` lists them")
    first = lines.index(f"{group}:") + 1
    last = next((at for at in range(first, len(lines)) if not lines[at].startswith(" ")), len(lines))
    return [f"# @package {group}", *(line[2:] for line in lines[first:last])]


class Origins:
    """Where values come from: the words, the file of a chosen option, or a rule of rcpo's."""

    def __init__(self, argv: list[str]) -> None:
        self._typed = {word.lstrip("+").split("=")[0] for word in argv if "=" in word}
        self._seen: Composition = look_at(argv)
        self._folders = [*config_dirs(argv), conf_dir()]
        self._given = dict(leaves(self._seen.tree, ""))

    def of(self, key: str, rule: str) -> str:
        """Of the value of `key`; `rule` says how rcpo decides where it is null."""
        if key in self._typed:
            return "typed"
        if self._given.get(key) is None:
            return f"rcpo: {rule}"
        group, _, rest = key.partition(".")
        choices = self._seen.choices
        chosen = option_file("experiment", choices.get("experiment") or "", self._folders)
        if chosen is not None and key in dict(leaves(option_tree(chosen), "")):
            return f"experiment={choices['experiment']}"
        return f"{group}={choices[group]}" if rest and group in choices else "conf/config.yaml"


def _lines(config: ResolvedConfig, inputs: Inputs, origins: Origins) -> Iterator[Line]:
    train, optim, of = config.train, config.optim, origins.of
    tiny, ranks = config.model.path in BUILTIN, config.world_size()
    adapter = config.model.lora.rank is not None
    kind = inputs.kind
    yield Line("run_dir", config.run_dir, of("run_dir", "runs/NAME"))
    yield Line("objective", shown(_loss(config)), "its option and your words")
    yield Line("calibration", config.calibration.name, f"scope {config.calibration.scope}")
    yield Line(
        "data", f"{inputs.num_train} training {kind}, {inputs.num_held_out} held out", _held_out(config)
    )
    device = _auto(of("train.device", ""), "a GPU where there is one")
    yield Line("train.device", f"{train.device}, ranks: {ranks}", device)
    yield Line("model.dtype", config.model.dtype, _auto(of("model.dtype", ""), "bfloat16 on GPUs alone"))
    warmup = f"{optim.warmup_steps} steps"
    if optim.warmup_ratio is not None:
        warmup = f"{percent(optim.warmup_ratio)} of the steps"
    yield Line("optim", optim.name, f"schedule {optim.schedule}, warm-up of {warmup}")
    model = f"{config.model.path if tiny else 'a model of yours'}{', with an adapter' if adapter else ''}"
    yield Line("optim.lr", f"{optim.lr:g}", of("optim.lr", f"for {model}"))
    steps = inputs.num_steps(config)
    length = "train.epochs" if train.epochs is not None else "train.steps"
    passes = f"{steps * train.pairs_per_step / inputs.num_train:.3g} passes over the {kind}"
    rule = f"150 for data={config.data.source}" if train.epochs is None else "one pass"
    yield Line("train.steps", f"{steps} ({passes})", of(length, rule))
    yield Line("train.pairs_per_step", str(train.pairs_per_step), of("train.pairs_per_step", ""))
    share = train.pairs_per_step // ranks
    rule = f"the largest divisor of {share} that is allowed for {config.model.path if tiny else train.device}"
    micro = f"{train.pairs_per_device}, accumulated {share // train.pairs_per_device} times"
    yield Line("train.pairs_per_device", micro, of("train.pairs_per_device", rule))
    rule = "25 for models that ship, else 100"
    yield Line("train.eval_every", str(train.eval_every), of("train.eval_every", rule))
    rule = "1 on CPUs" if train.device == "cpu" else "the lowest that fits into the GPUs' memory"
    yield Line("deepspeed.stage", str(config.zero_stage), of("deepspeed.stage", rule))
    yield Line("reference", *_reference(config, inputs))
    model = shapes_of(config.model)
    live = live_reference_bytes(config, model, config.zero_stage)
    rows = 2 * train.pairs_per_device * inputs.train.slots
    budget = memory_budget(config, model, rows, max(inputs.train.widths()), reference=live)
    yield Line("memory of a rank", f"about {in_bytes(sum(budget.values()))}", in_words(budget))
    name = config.tracking.name
    if name == "wandb":
        yield Line("tracking", wandb_mode(config.tracking), of("tracking.mode", ""))
    else:
        yield Line("tracking", name, of("tracking", ""))


def _held_out(config: ResolvedConfig) -> str:
    """Where the held-out pairs come from."""
    data = config.data
    if data.eval_path is not None:
        return "held out: data.eval_path"
    return "held out: drawn" if data.eval_split is None else f"held out: the split {data.eval_split}"


def _auto(origin: str, rule: str) -> str:
    """A default that says auto is decided by a rule."""
    return origin if origin == "typed" else f"rcpo: {rule}"


def _loss(config: ResolvedConfig) -> dict[str, Any]:
    """The objective with its parameters."""
    return {"name": config.objective["name"], **config.objective_function.params()}


def _reference(config: ResolvedConfig, inputs: Inputs) -> tuple[str, str]:
    """What displacement is measured against, and how it is had."""
    of = config.reference.path if has_own_weights(config) else "the initial policy"
    num = len(inputs.train) + len(inputs.held_out)
    had = "a model in memory, batch by batch" if config.reference.name == "live" else f"{num} pairs, once"
    return f"{of}: {had}", f"reference={config.reference.name}"


def plan_text(lines: Sequence[Line]) -> str:
    """The lines in three columns."""
    first = max(len(line.what) for line in lines)
    second = min(44, max(len(line.value) for line in lines))
    return "\n".join(f"{line.what:<{first}}  {line.value:<{second}}  {line.origin}" for line in lines)
