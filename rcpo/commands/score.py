"""`rcpo score [GROUP=OPTION] [KEY=VALUE] ...`: what a model says of preference pairs before training."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.commands.flags import Flags, add_config_words, add_printing_flags, check_writable
from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically

if TYPE_CHECKING:
    from rcpo.config.resolved import ResolvedConfig
    from rcpo.training.read_inputs import PairsRead


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Score the pairs of a data config under a model, before training: CHES and length-normalised CHES
(arXiv 2410.08847), meant to predict how far the chosen response falls, log-probabilities and
margin, length, shared beginning and edit distance of the responses; pairs that repeat or contradict
each other. The words are those of rcpo train. Bad rows are counted, whatever data.on_bad_row says."""
    parser.epilog = """\
examples:
  rcpo score
  rcpo score model.path=MODEL data=file data.path=PAIRS.jsonl train.max_length=512 --out pairs.parquet
  rcpo train model.path=MODEL data=file data.path=PAIRS.jsonl train.max_length=512 \\
      data.filter.scores=pairs.parquet data.filter.ches_norm_max_percentile=5"""
    add_config_words(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("scores.parquet"),
        metavar="FILE",
        help="where the scores go, a row a pair (default: scores.parquet); FILE.html beside it shows them",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace both files")
    add_printing_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Score; returns the exit code. Raises UserError for bad input, before anything is written."""
    from rcpo.config.compose import compose

    tree = compose([*options.hydra, *options.words])
    if tree is None:
        return 0
    page = _check_out(options.out, options.overwrite)
    from rcpo.launch.first_look import look_at_inputs

    look_at_inputs(tree)
    from rcpo.common.console import RunConsole
    from rcpo.config.resolve import resolve
    from rcpo.config.validate import validate
    from rcpo.data.score_file import PairScoreFile, write_pair_scores
    from rcpo.quality.page import make_page
    from rcpo.quality.summary import print_summary
    from rcpo.training.read_inputs import read_pairs

    config, notes = _to_score(resolve(validate(tree), None))
    read = read_pairs(config)
    read.records.report.extend(notes)
    console = RunConsole()
    pair_scores = PairScoreFile(_score(config, read, console), made_with(config))
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_pair_scores(options.out, *pair_scores)
        write_atomically(page, make_page(pair_scores, read))
    except OSError as error:
        raise UserError(f"--out {options.out}: cannot be written ({error.strerror})") from None
    print_summary(console, pair_scores, read)
    console.print(f"wrote {options.out} and {page}", soft_wrap=True)
    return 0


def _check_out(out: Path, overwrite: bool) -> Path:
    """The page's path. Raises UserError where one of the two files cannot be written, before an hour of
    scoring."""
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: must end in .parquet; type --out scores.parquet")
    page = out.with_suffix(".html")
    for path in (out, page):
        check_writable("--out", path)
        if path.exists() and not overwrite:
            raise UserError(f"--out {out}: {path} exists; give another name, or type --overwrite")
    return page


def _to_score(config: "ResolvedConfig") -> "tuple[ResolvedConfig, list[str]]":
    """Rows that cannot train are counted, and nothing is filtered; with notes about the held-out split. Of a
    whole list the best and the worst response are a pair."""
    from rcpo.records.held_out_split import with_held_out_split

    unfiltered = dataclasses.replace(config.data.filter, scores=None)
    data = dataclasses.replace(config.data, on_bad_row="drop", filter=unfiltered)
    if data.lists == "whole":
        data = dataclasses.replace(data, lists="best_worst")
    data, notes = with_held_out_split(data)
    return dataclasses.replace(config, data=data), notes


def made_with(config: "ResolvedConfig") -> dict[str, Any]:
    """What the scores depend on, for the file."""
    import rcpo

    return {
        "model.path": config.model.path,
        "model.dtype": config.model.dtype,
        "data": ", ".join(config.data.train_paths()) or config.data.source,
        "train.max_length": config.train.max_length,
        "train.max_prompt_length": config.train.max_prompt_length,
        "rcpo": rcpo.__version__,
    }


def _score(config: "ResolvedConfig", read: "PairsRead", console: Any) -> Any:
    """The table of scores of all training and held-out pairs."""
    import torch

    from rcpo.common.console import passes_shown
    from rcpo.data.score_file import HELD_OUT, TRAIN
    from rcpo.models.evaluation import eval_batch
    from rcpo.models.load import load_model
    from rcpo.models.policy import Policy
    from rcpo.quality.ches import ModelScores, score_pairs
    from rcpo.quality.pairs import PairFacts, describe_pairs
    from rcpo.quality.score_table import make_table

    device = torch.device(config.train.device)
    policy = Policy(load_model(config.model, device)).to(device)
    size = eval_batch(config)
    pad_id = read.tokenizer.pad_token_id or 0
    num_pairs = len(read.train.pairs) + len(read.held_out.pairs)
    parts: dict[str, tuple[Sequence[PairFacts], Sequence[ModelScores]]] = {}
    with passes_shown(console, "scoring", num_pairs) as on_batch:
        for split, pairs in ((TRAIN, read.train.pairs), (HELD_OUT, read.held_out.pairs)):
            parts[split] = (describe_pairs(pairs), score_pairs(policy, pairs, pad_id, size, on_batch))
    return make_table(parts)
