"""`rcpo train [GROUP=OPTION] [KEY=VALUE] ...`: compose, validate, freeze, start the workers."""

import argparse
import itertools
from typing import TYPE_CHECKING, Any

from rcpo.commands.flags import (
    GRID_FLAGS,
    Flags,
    add_config_words,
    add_grid_flags,
    add_printing_flags,
    check_grid_flags,
)
from rcpo.common.doing import doing
from rcpo.common.errors import UserError
from rcpo.common.imports import quick_imports

if TYPE_CHECKING:
    from rcpo.config.resolved import ResolvedConfig

EXAMPLES = """\
files of your own, for --config-dir:
  DIR/objective/mine.yaml        name: dpo            # a loss that rcpo has
                                 beta: 0.3            # its parameters
  DIR/experiment/base.yaml       # @package _global_
                                 defaults:            # options that this experiment chooses
                                   - override /objective: mine
                                   - override /calibration: "on"
                                 train: {steps: 300}  # and any keys; the command line still wins

examples:
  rcpo train objective=simpo calibration=on
      the embedded default: a tiny model and word problems; no GPU, network or account, about a minute
  rcpo train model.path=MODEL data=file data.path=PAIRS.jsonl calibration=balance optim.lr=1e-6
      your model (a folder or a hub id) and your pairs (columns prompt, chosen, rejected)
  rcpo train objective=dpo objective.beta=0.05 train.steps=300 seed=1 name=dpo-low-beta
      keys change single values
  rcpo train objective=dpo launch.processes=2
      two ranks on CPU; on GPUs: launch.gpus_per_node=8, or start the same command with torchrun or srun
  rcpo train -m objective=dpo,simpo calibration=off,on 'seed=range(3)' --parallel 2
      a run of each combination, as a sweep: rcpo status, rcpo resume, and the same words go on with it
  rcpo train model.path=MODEL data=file data.path=PAIRS.jsonl --plan
      what that would do: steps, learning rate, micro-batch, memory, and who decided each
  rcpo train objective=simpo --help
      this text for the options that the other words choose"""


def add_arguments(parser: Flags) -> None:
    parser.usage = "%(prog)s [GROUP=OPTION ...] [KEY=VALUE ...] [flags]"
    parser.description = """\
Train a language model on preference pairs, with or without reward calibration.

A run writes into its run folder only (runs/NAME; set with name= or run_dir=) and says at its end
what happened to the chosen responses. Bad input is one line and exit code 2. `rcpo completion
--help` sets up the TAB key."""
    parser.epilog = EXAMPLES
    add_config_words(parser, "the lists below")
    parser.add_argument(
        "-h", "--help", dest="explain", action="store_true", help="this text, for what the other words choose"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the old run of that name or run_dir, once the new one is checked",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="show what the run would do, and who decided each value; write nothing",
    )
    add_printing_flags(parser)
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="a run of each combination of values: objective=dpo,simpo 'seed=range(3)'",
    )
    add_grid_flags(parser.add_argument_group("flags of -m, as of `rcpo sweep`"))
    parser.check = check


def check(options: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    if options.explain:
        return
    if not options.multirun:
        given = next((name for name in GRID_FLAGS if getattr(options, name) not in (None, False)), None)
        if given is not None:
            raise UserError(
                f"--{given.replace('_', '-')}: is for several runs; type -m as well, or leave it out"
            )
        return
    if options.overwrite:
        raise UserError("--overwrite: replaces one run; type --out FOLDER for the runs of -m anew")
    if options.plan:
        raise UserError("--plan: is of one run; type --dry-run with -m")
    if printing := next((word for word in options.hydra if word in ("--cfg", "--info", "--resolve")), None):
        raise UserError(
            f"{printing}: prints the config of one run; leave out -m and give one value of each key"
        )
    check_grid_flags(options)


def run(options: argparse.Namespace) -> int:
    """Train as configured; returns the exit code. Raises UserError for bad input, before anything is
    written."""
    is_run = not (options.explain or options.plan or options.hydra)
    if is_run:
        doing("reading the words")
    from rcpo.config.compose import compose
    from rcpo.config.refused import only_prints

    words = [*options.hydra, *options.words]
    if options.multirun and not options.explain:
        from rcpo.commands.sweep import run_grid
        from rcpo.sweep.inline import definition_of_words

        return run_grid(definition_of_words(words), options)
    if _asks_resolved(words) or options.plan:
        print(planned(words, options))
        return 0
    if only_prints(words) and compose(words) is None:
        return 0
    if options.explain:
        explain(words)
        return 0
    from rcpo.ranks.environment import joined_world_size

    tree = None
    if joined_world_size() is None:  # else rank 0 alone composes, and speaks for all
        from rcpo.launch.first_look import ask_hub, look

        tree = compose(words)
        if tree is None:
            return 0
        look(tree, options.overwrite)
        ask_hub(tree)
        doing("loading torch and transformers")
    with quick_imports():
        from rcpo.launch.start import start

    return start(lambda: prepare(words, tree), overwrite=options.overwrite)


def _asks_resolved(words: list[str]) -> bool:
    """Whether these words are --cfg job --resolve: the config with what rcpo decides."""
    pairs = itertools.pairwise(words)
    return "--resolve" in words and any(flag in ("--cfg", "-c") and kind == "job" for flag, kind in pairs)


def planned(words: list[str], options: argparse.Namespace) -> str:
    """What the run of these words would do, or its resolved config. Raises UserError for what the run would
    refuse."""
    from rcpo.config.compose import compose
    from rcpo.config.refused import without_printing
    from rcpo.launch.first_look import look

    plain = without_printing(words)
    tree = compose(plain)
    assert tree is not None
    if not options.plan:
        from rcpo.launch.plan import resolved_text

        return resolved_text(words, tree)
    look(tree, options.overwrite)
    from rcpo.launch.plan import plan_lines, plan_text

    return plan_text(plan_lines(plain, tree))


def explain(words: list[str]) -> None:
    """Print the help: the flags, the groups and keys of the config that the words choose, examples."""
    from rcpo.commands.parser import command_parser
    from rcpo.config.help import choices_text

    parser = command_parser("train")
    parser.epilog = f"{choices_text(words)}\n\n{EXAMPLES}"
    parser.print_help()


def prepare(words: list[str], tree: dict[str, Any] | None = None) -> "ResolvedConfig | None":
    """The resolved config of these words, composed to `tree` already or not, or None when Hydra only printed
    something."""
    from rcpo.config.compose import compose
    from rcpo.config.resolve import resolve
    from rcpo.config.validate import validate
    from rcpo.ranks.environment import joined_world_size

    if tree is None:
        tree = compose(words)
    return None if tree is None else resolve(validate(tree), joined_world_size())
