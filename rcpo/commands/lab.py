"""`rcpo lab tokens RUN`: experiments on what training did to a model."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from rcpo.commands.flags import Flags
from rcpo.commands.settings import Setting, add_settings, split_words, whole_number
from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically

if TYPE_CHECKING:
    from rcpo.evaluation.subject import Subject

KINDS = ("tokens",)
SETTINGS = (
    Setting("step", "the checkpoint of that step, in place of the run's end"),
    Setting("pairs", "only so many of the first held-out pairs", whole_number(1)),
    Setting("top", "tokens to list (default: 10)", whole_number(1), 10),
    Setting("batch", "pairs at once (default: 16)", whole_number(1), 16),
)


def add_arguments(parser: Flags) -> None:
    parser.description = """\
tokens: where the probability went. At every position of the held-out chosen and rejected responses
the model that the run started from and the trained one are compared: which tokens gained and lost
most; what the response's own token lost, by who gained it (the other response's token there, words
of refusal, the end of text, others); entropy; and how much of the displacement is in the first ten
tokens, the shared beginning, the content and the end. One pass of each model. Writes RUN/lab/."""
    parser.epilog = """\
examples:
  rcpo lab tokens RUN
  rcpo lab tokens RUN step=50 pairs=64"""
    add_settings(parser, SETTINGS, "tokens RUN")


def run(options: argparse.Namespace) -> int:
    """Look; returns the exit code. Raises UserError for bad input, before weights are loaded."""
    places, settings = split_words(options.words, SETTINGS)
    if len(places) != 2 or places[0] not in KINDS:
        raise UserError(f"{' '.join(places)}: must be `tokens` and a run; type rcpo lab tokens RUN")
    from rcpo.common.console import RunConsole
    from rcpo.evaluation.subject import find_subject

    subject = find_subject(places[1], settings.step)
    if subject.run is None:
        raise UserError(f"{places[1]}: is no run folder, and has no held-out pairs; give a run")
    console = RunConsole()
    found = _tokens(subject, settings, console)
    place = subject.run.path / "lab" / f"tokens-{subject.when}.json"
    try:
        place.parent.mkdir(exist_ok=True)
        write_atomically(place, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(
            f"{place}: cannot be written ({error.strerror}); make room and type it again"
        ) from None
    for side in ("chosen", "rejected"):
        _print(console, side, found[side])
    console.print(f"wrote {place}", soft_wrap=True)
    return 0


def _tokens(subject: "Subject", settings: argparse.Namespace, console: Any) -> dict[str, Any]:
    from rcpo.evaluation.moves import follow
    from rcpo.evaluation.moves_summary import refusal_ids, summarise
    from rcpo.evaluation.subject import Loaded, initial_of
    from rcpo.models.policy import Policy
    from rcpo.training.read_inputs import tokenise

    assert subject.config is not None
    first = Loaded(initial_of(subject))
    held_out = tokenise(subject.config, first.tokenizer).held_out.pairs
    pairs = held_out[:: held_out.slots][: settings.pairs]  # of a list its best and its worst response
    console.print(f"{len(pairs)} held-out pairs under the initial model and {subject.when}", soft_wrap=True)
    policies = Policy(first.model), Policy(subject.load())
    ids = refusal_ids(first.tokenizer), first.asking.stop_ids
    sides = follow(*policies, pairs, first.asking.pad_id, settings.batch, *ids)
    return {
        name: summarise(side, first.tokenizer, settings.top)
        for name, side in zip(("chosen", "rejected"), sides, strict=True)
    }


def _print(console: Any, side: str, found: dict[str, Any]) -> None:
    from rich.table import Table

    other = "rejected" if side == "chosen" else "chosen"
    entropy = found["entropy"]
    console.print(
        f"\n{side}: {found['nats']:+.2f} nats a response; entropy {entropy['before']:.3f} -> "
        f"{entropy['after']:.3f} nats a position",
        soft_wrap=True,
    )
    table = Table("its own tokens lost to", "share", "per nat lost", box=None, pad_edge=False)
    names = {"opposite": f"the {other} response's token", "refusal": "words of refusal", "end": "end of text"}
    for name, numbers in found["to"].items():
        table.add_row(names.get(name, name), *(_number(numbers[key]) for key in ("share", "per_nat")))
    console.print(table)
    table = Table("place", "nats", "share", box=None, pad_edge=False)
    for name, numbers in found["places"].items():
        table.add_row(name.replace("_", " "), f"{numbers['nats']:+.2f}", _number(numbers["share"]))
    console.print(table)
    for key, said in (
        ("gained", "gained most"),
        ("lost_most", "lost most"),
        ("first_gained", "gained first"),
    ):
        tokens = ", ".join(f"{each['token']!r} {each['change']:.3f}" for each in found[key])
        console.print(f"{said}: {tokens or 'none'}", soft_wrap=True, markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
