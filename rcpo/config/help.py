"""`rcpo train --help`: groups, options and keys of the config that the words on the command line choose.

Owns the layout alone. Values come from Hydra's composition (`rcpo.config.compose`), meanings from the
docstrings of `rcpo.config.schema`, and where that has none from the comments in the YAML files.
"""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rcpo.config.meanings import comments, first_comment, leaves, option_file, schema_meanings, shown
from rcpo.config.schema import Config

WIDTH = 110

HEADER = """rcpo train: train a language model on preference pairs, with or without reward calibration.

usage: rcpo train [GROUP=OPTION ...] [KEY=VALUE ...] [FLAGS]

examples:
  rcpo train objective=simpo calibration=on
      the embedded default: a tiny model and word problems; no GPU, network or account, about a minute
  rcpo train model.path=MODEL data=file data.path=PAIRS.jsonl objective=dpo calibration=on optim.lr=1e-6
      your model (a folder or a hub id) and your pairs (columns prompt, chosen, rejected)
  rcpo train objective=dpo objective.beta=0.05 train.steps=300 seed=1 name=dpo-low-beta
      keys change single values
  rcpo train objective=dpo launch.processes=2
      two ranks on CPU; on GPUs: launch.gpus_per_node=8, or start the same command with torchrun or srun"""

FLAGS = """flags:
  --help                         this text for the options that the other words choose: objective=simpo --help
  --cfg job                      print the composed config as YAML and stop; nothing is trained or written
  --cfg job --package objective  the same, one group of it
  --overwrite                    replace the old run of that name or run_dir, once the new one is checked
  --config-dir DIR               add a folder of your own options: DIR/objective/mine.yaml is objective=mine

files of your own, for --config-dir:
  DIR/objective/mine.yaml        name: dpo            # a loss that rcpo has
                                 beta: 0.3            # its parameters
  DIR/experiment/base.yaml       # @package _global_
                                 defaults:            # options that this experiment chooses
                                   - override /objective: mine
                                   - override /calibration: "on"
                                 train: {steps: 300}  # and any keys; the command line still wins

A run writes into its run folder only (runs/NAME; set with name= or run_dir=) and says at its end what
happened to the chosen responses. Bad input is one line and exit code 2. `rcpo completion --help` sets up the
TAB key."""


def help_text(
    tree: dict[str, Any], options: dict[str, list[str]], choices: dict[str, str], folders: Sequence[Path]
) -> str:
    """The whole text. `tree` is the composed config with ??? where a value is unset, `options` the options of
    each group, `choices` the chosen ones, `folders` where their YAML files are, the user's first."""
    own = [group for group in options if group not in tree and group != "hydra"]
    listed = [group for group in [*tree, *own] if options.get(group)]
    groups = [line for group in listed for line in _group_lines(group, options, choices, folders)]
    keys = _key_lines(tree, choices, folders)
    return "\n".join(
        [
            HEADER,
            "",
            "groups: GROUP=OPTION chooses a file of settings (* is chosen now)",
            *groups,
            "",
            "keys: KEY=VALUE sets one (shown: its value now; null: rcpo decides; ???: you must give it)",
            *keys,
            "",
            FLAGS,
        ]
    )


def _group_lines(
    group: str, options: dict[str, list[str]], choices: dict[str, str], folders: Sequence[Path]
) -> Iterator[str]:
    yield f"  {group}"
    width = max(len(option) for option in options[group])
    for option in options[group]:
        mark = "*" if choices.get(group) == option else " "
        text = first_comment(option_file(group, option, folders))
        yield from _filled(f"   {mark} {option:<{width}}  ", text)


def _key_lines(tree: dict[str, Any], choices: dict[str, str], folders: Sequence[Path]) -> Iterator[str]:
    """A line for each key: dotted name, value, meaning."""
    shared = comments(folders[-1] / "every_objective.yaml")
    meanings = comments(folders[-1] / "config.yaml")
    meanings |= {f"objective.{key}": text for key, text in shared.items()}
    for group in tree:
        file = option_file(group, choices.get(group) or "", folders)
        meanings |= {f"{group}.{key}": text for key, text in comments(file).items()}
    meanings |= dict(schema_meanings(Config, ""))
    # Keys that stand alone first, then section by section; what all objectives have after what one has.
    own = sorted(tree["objective"].items(), key=lambda item: item[0] in shared)
    ordered = tree | {"objective": dict(own)}
    for name, value in sorted(leaves(ordered, ""), key=lambda leaf: "." in leaf[0]):
        if name not in HIDDEN:
            yield from _filled(f"  {f'{name}={shown(value)}':<34}  ", meanings.get(name, ""))


HIDDEN = (
    "objective.name",
    "calibration.name",
    "optim.name",
    "tracking.name",
    "data.source",
    "reference.name",
)
"""What the choice of an option decides, not keys to set."""


def _filled(start: str, text: str) -> Iterator[str]:
    """`start` and `text`, further lines of it indented to where it began."""
    indent = " " * (len(start) if len(start) <= 40 else 38)
    lines = textwrap.wrap(text, WIDTH - len(indent)) or [""]
    if len(start) > 40 and text:
        yield start.rstrip()
        start = indent
    yield (start + lines[0]).rstrip()
    yield from (indent + line for line in lines[1:])
