"""`rcpo data PATH... [GROUP=OPTION] [KEY=VALUE] ...`: what `rcpo train` would train on, before it does."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.commands.flags import Flags, add_config_words, add_printing_flags, positive_int
from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.config.resolved import ResolvedConfig


def add_arguments(parser: Flags) -> None:
    parser.usage = "%(prog)s [PATH ...] [GROUP=OPTION ...] [KEY=VALUE ...] [flags]"
    parser.description = """\
Show what `rcpo train` with the same words would train on: what became of every row, how long prompts
and responses are, and pairs as the model sees them, with the scored part highlighted, special tokens
and cuts. Loads the tokenizer and no weights. PATH is short for data=file data.path=PATH; several are
one data set, as data.path='[A, B]'. The exit code is 2 where `rcpo train` would refuse the data."""
    parser.epilog = """\
examples:
  rcpo data PAIRS.jsonl model.path=MODEL train.max_length=512
  rcpo data PAIRS.jsonl model.path=MODEL --pairs 0 --row 17 --row 203
  rcpo data PAIRS.jsonl model.path=MODEL --pairs 12 --sheet images.png
  rcpo data PAIRS.jsonl model.path=MODEL --json | jq .rows.training"""
    add_config_words(parser)
    parser.add_argument(
        "--pairs", type=_count, default=3, metavar="N", help="show the first N training pairs (default: 3)"
    )
    parser.add_argument(
        "--row",
        type=_count,
        action="append",
        default=[],
        dest="rows",
        metavar="K",
        help="show the pair of row K, counted from 0, too; may be given again",
    )
    parser.add_argument(
        "--sheet", metavar="FILE.png", help="write the images of these pairs into one picture to look at"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--color", action="store_true", help="colours even where this is no terminal")
    add_printing_flags(parser)


def _count(text: str) -> int:
    return 0 if text == "0" else positive_int(text)


def run(options: argparse.Namespace) -> int:
    """Print what would be trained on; returns the exit code. Raises UserError for bad input."""
    from rcpo.config.compose import compose

    tree = compose([*options.hydra, *config_words(options.words)])
    if tree is None:
        return 0
    from rcpo.launch.first_look import look_at_inputs

    try:
        look_at_inputs(tree)
        from rcpo.quality.preview import preview_of

        preview = preview_of(_resolved(tree), options.pairs, options.rows)
    except UserError as error:
        if options.json:
            print(json.dumps({"refused": str(error), "rows": None, "notes": [], "lengths": {}, "pairs": []}))
        raise
    if options.sheet is not None:
        from rcpo.quality.sheet import write_sheet

        write_sheet(preview.pairs, Path(options.sheet))
    if options.json:
        print(json.dumps(preview.as_json(), ensure_ascii=False))
    else:
        from rcpo.quality.preview_text import print_preview

        print_preview(_console(options.color), preview)
    if preview.refused is not None:
        raise UserError(preview.refused)
    return 0


def config_words(words: Sequence[str]) -> list[str]:
    """The words of `rcpo train`: those without a = are the data's paths."""
    paths = [word for word in words if "=" not in word and not word.startswith("~")]
    others = [word for word in words if word not in paths]
    if not paths:
        return others
    chosen = [] if any(word.startswith("data=") for word in others) else ["data=file"]
    quoted = ", ".join(json.dumps(path, ensure_ascii=False) for path in paths)
    return [*chosen, f"data.path=[{quoted}]" if len(paths) > 1 else f"data.path={quoted}", *others]


def _resolved(tree: dict[str, Any]) -> "ResolvedConfig":
    """For whatever machine will train: that it has no GPU here says nothing of the data."""
    from rcpo.config.resolve import resolve
    from rcpo.config.validate import validate

    tree["train"]["device"] = "cpu"
    tree["launch"] |= {"gpus_per_node": None, "nodes": 1}
    return resolve(validate(tree), None)


def _console(in_colour: bool) -> Any:
    from rcpo.common.console import RunConsole

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return RunConsole(in_colour)
