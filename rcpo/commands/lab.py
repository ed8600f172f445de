"""`rcpo lab tokens RUN`, `persona [MODEL]`, `refusal MODEL`: experiments on what training does to a model."""

import argparse
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.commands import lab_persona, lab_refusal
from rcpo.commands.flags import Flags
from rcpo.commands.settings import Setting, add_settings, setting_lines, split_words, whole_number
from rcpo.common.errors import UserError, shortened
from rcpo.common.files import write_atomically

if TYPE_CHECKING:
    from rcpo.evaluation.subject import Subject

SETTINGS = (
    Setting("step", "the checkpoint of that step, in place of the run's end"),
    Setting("pairs", "only so many of the first held-out pairs", whole_number(1)),
    Setting("top", "tokens to list (default: 10)", whole_number(1), 10),
    Setting("batch", "pairs at once (default: 16)", whole_number(1), 16),
)
KINDS = {"tokens": SETTINGS, "persona": lab_persona.SETTINGS, "refusal": lab_refusal.SETTINGS}
"""Experiments, and the settings of each."""
TYPED = {"tokens": "tokens RUN", "persona": "persona [MODEL]", "refusal": "refusal MODEL"}
GROUPS = ("model", "optim", "reference", "deepspeed", "tracking", "seed")
"""Words of `rcpo train` without a dot, which are passed on as those with one are."""


def add_arguments(parser: Flags) -> None:
    parser.description = """\
tokens: where the probability went. At every position of the held-out chosen and rejected responses
the model that the run started from and the trained one are compared: which tokens gained and lost
most; what the response's own token lost, by who gained it (the other response's token there, words
of refusal, the end of text, others); entropy; and how much of the displacement is in the first ten
tokens, the shared beginning, the content and the end. One pass of each model. Writes RUN/lab/.

persona: the one-token experiment of arXiv 2410.08847. Prompts are answered with one token, Yes
against No say, with each objective and each calibration: p(chosen) before, after, and where it was
smallest; which tokens gained, and which ones theory names. A sweep of runs in a folder: the same
words go on after a stop. KEY=VALUE words of rcpo train are passed on. Without MODEL, the model that
ships on its own words.

refusal: does training on a model's own refusals make it refuse? Two answers to each prompt of your
file are drawn and labelled; the one that refuses is chosen. Every objective with every calibration
trains on these pairs, and its greedy answers are labelled as before. The same words go on after a
stop. Words of rcpo train are passed on here too."""
    parser.epilog = """\
examples:
  rcpo lab tokens RUN
  rcpo lab tokens RUN step=50 pairs=64
  rcpo lab persona
  rcpo lab persona MODEL prompts=PROMPTS.jsonl pairs=Yes/No,No/Never objectives=dpo,simpo \\
      calibrations=off,on,exact,balance optim.lr=1e-6 train.steps=50
  rcpo lab refusal MODEL prompts=PROMPTS.jsonl ches=50 optim.lr=1e-6"""
    parser.add_argument("--yes", action="store_true", help="of refusal: send a judge its requests")
    add_settings(parser, [each for settings in KINDS.values() for each in settings], "EXPERIMENT")
    parser.usage = "\n       ".join(f"%(prog)s {typed} NAME=VALUE ..." for typed in TYPED.values())
    of_kinds = [f"settings of {kind}:\n{setting_lines(settings)}" for kind, settings in KINDS.items()]
    parser.epilog = "\n\n".join([*of_kinds, parser.epilog[parser.epilog.index("examples:") :]])


def run(options: argparse.Namespace) -> int:
    """Look, or train and look; returns the exit code. Raises UserError for bad input, before weights are
    loaded."""
    kind, *words = options.words
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean rcpo lab {close[0]}?" if close else f"choose one of {', '.join(KINDS)}"
        raise UserError(f"{shortened(kind)}: is no experiment; {hint}")
    passed_on = [word for word in words if kind != "tokens" and _is_of_train(word)]
    places, settings = split_words([word for word in words if word not in passed_on], KINDS[kind])
    if options.yes and kind != "refusal":
        raise UserError(f"--yes: is for rcpo lab refusal with url=; leave it out of {kind}")
    settings.yes = options.yes
    if kind == "tokens":
        return _run_tokens(places, settings)
    if len(places) > 1:
        raise UserError(f"{' '.join(places)}: must be one model; type rcpo lab {TYPED[kind]}")
    of_kind = {"persona": lab_persona.run, "refusal": lab_refusal.run}[kind]
    return of_kind(places[0] if places else None, passed_on, settings)


def _is_of_train(word: str) -> bool:
    key, is_one, _ = word.partition("=")
    return bool(is_one) and ("." in key or key in GROUPS)


def _run_tokens(places: list[str], settings: argparse.Namespace) -> int:
    if len(places) != 1:
        raise UserError(f"{' '.join(places) or 'tokens'}: must be one run; type rcpo lab tokens RUN")
    if not Path(places[0], "config.yaml").is_file():
        raise UserError(f"{places[0]}: is no run folder, and has no held-out pairs; give a run")
    from rcpo.common.console import RunConsole
    from rcpo.evaluation.subject import find_subject

    subject = find_subject(places[0], settings.step)
    assert subject.run is not None
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
