"""`rcpo generate RUN|MODEL prompts=FILE format=... out=FILE`: answers of a model, in the files that other
tools read."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.commands.flags import Flags, check_writable
from rcpo.commands.settings import (
    ENGINE,
    Setting,
    add_settings,
    number_in,
    one_of,
    split_words,
    whole_number,
)
from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically
from rcpo.evaluation.engines import TRANSFORMERS, refuse_images, refuse_missing_engine

if TYPE_CHECKING:
    from rcpo.evaluation.prompts import Asking, Prompt
    from rcpo.evaluation.subject import Subject
    from rcpo.records.record import PreferenceRecord

FORMATS = ("jsonl", "alpaca_eval", "mt_bench", "arena_hard")
NAMED = ("held_out", "arithmetic")
"""Prompts that need no file."""
SETTINGS = (
    Setting(
        "prompts", "a .json or .jsonl file of prompts; held_out: the run's pairs; arithmetic: word problems"
    ),
    Setting("out", "the file to write", Path),
    Setting(
        "format", "jsonl (default), alpaca_eval, mt_bench or arena_hard", one_of(FORMATS), "jsonl", FORMATS
    ),
    Setting("step", "the run's checkpoint of that step; 0: the model that it started from"),
    Setting("answers", "so many answers a prompt (default: 1)", whole_number(1), 1),
    Setting("temperature", "0: greedy (default); above it answers are drawn", number_in(0, 100), 0.0),
    Setting(
        "top_p", "draw from the likeliest tokens that have this share (default: 1)", number_in(1e-6, 1), 1.0
    ),
    Setting("seed", "of the draws (default: 0)", whole_number(0), 0),
    Setting("max_new_tokens", "of an answer (default: 512)", whole_number(1), 512),
    Setting("batch", "prompts at once (default: 16; given to vllm: 256)", whole_number(1)),
    ENGINE,
    Setting("system", "a system turn for prompts that have none"),
    Setting("chat_template", "plain, or a jinja file; by default the model's own"),
    Setting("name", "the model's name in the file (default: the run's)"),
)


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Write a model's answers to prompts, in the file that AlpacaEval, MT-Bench (both turns) or Arena-Hard
reads, or as plain lines. Chat template and system turn are those of training, and an answer ends
with the token that training ended answers with. Rows with `image` or `images` are asked of models
that see, with the processor of training. In fp32 an answer depends on its prompt (and seed)
alone, not on what it is batched with. A generation that was killed goes on when the same is typed."""
    parser.epilog = """\
examples:
  rcpo generate RUN prompts=held_out out=answers.jsonl
  rcpo generate RUN prompts=alpaca_eval.json format=alpaca_eval out=outputs.json
  rcpo generate MODEL prompts=question.jsonl format=mt_bench out=model_answer/mine.jsonl"""
    add_settings(parser, SETTINGS, "RUN|MODEL")
    parser.add_argument("--overwrite", action="store_true", help="replace the file, and begin again")


def run(options: argparse.Namespace) -> int:
    """Generate; returns the exit code. Raises UserError for bad input, before weights are loaded."""
    places, settings = split_words(options.words, SETTINGS)
    if len(places) != 1:
        raise UserError(
            f"{' '.join(places) or 'nothing'}: give one run folder or model; `rcpo generate --help`"
        )
    out = _check_out(settings, options.overwrite)
    refuse_missing_engine(settings.engine)
    from rcpo.models.places import refuse_no_run_or_model

    refuse_no_run_or_model(places[0])
    from rcpo.evaluation.forms import check_format
    from rcpo.evaluation.generation import Partial, asked_first
    from rcpo.evaluation.prompts import Asking
    from rcpo.evaluation.subject import find_subject
    from rcpo.models.load import read_config

    subject = find_subject(places[0], settings.step, settings.chat_template, settings.engine)
    prompts = read(settings.prompts, subject)
    check_format(settings.format, prompts, settings.answers)
    kwargs = subject.model.chat_template_kwargs
    _check_images(prompts, subject, settings.prompts, settings.format)
    asking = Asking(subject.tokenizer(may_see=True), kwargs, settings.system, subject.system)
    positions = getattr(read_config(subject.model).get_text_config(), "max_position_embeddings", None)
    first = asked_first(asking, prompts, f"prompts={settings.prompts}", positions)
    partial = Partial(out, _made_with(settings, subject, prompts), options.overwrite)
    write_atomically_or_say(out, _generate(settings, subject, asking, prompts, first, partial))
    partial.remove()
    by = "" if subject.engine == TRANSFORMERS else f", by {subject.engine}"
    num, name = len(prompts) * settings.answers, settings.name or subject.name
    print(f"wrote {out}: {num} answers of {name}{by}")
    return 0


def _check_out(settings: argparse.Namespace, overwrite: bool) -> Path:
    for name in ("prompts", "out"):
        if getattr(settings, name) is None:
            raise UserError(f"{name}: is missing; type {name}=FILE")
    out: Path = settings.out
    wanted = ".json" if settings.format == "alpaca_eval" else ".jsonl"
    if out.suffix != wanted:
        raise UserError(
            f"out={out}: format={settings.format} is read from a {wanted} file; type out={out.stem}{wanted}"
        )
    check_writable("out", out)
    if out.exists() and not overwrite:
        raise UserError(f"out={out}: exists; give another name, or type --overwrite")
    return out


def read(named: str, subject: "Subject") -> "list[Prompt]":
    """The prompts of a file, or those that a name stands for."""
    from rcpo.evaluation.prompts import read_prompts, with_rows

    if named == "arithmetic":
        from rcpo.evaluation.arithmetic import problems_of
        from rcpo.records.arithmetic import user_turn

        return with_rows([user_turn(problem.prompt()) for problem in problems_of(subject)])
    if named == "held_out":
        if subject.config is None:
            raise UserError("prompts=held_out: a model has no held-out pairs; give a run, or prompts=FILE")
        held_out = _held_out(subject)
        return with_rows([record.prompt for record in held_out], [record.images for record in held_out])
    if not Path(named).is_file():
        raise UserError(
            f"prompts={named}: no such file; give one, or type prompts={' or prompts='.join(NAMED)}"
        )
    return read_prompts(Path(named))


def _held_out(subject: "Subject") -> "list[PreferenceRecord]":
    """The records that the run has noted as held out; where it has noted none, those that its data give."""
    from rcpo.records.load import load_records, records_at
    from rcpo.records.weights import weighing_of

    assert subject.config is not None
    assert subject.run is not None
    data = subject.config.data
    rows = (subject.run.read_run().get("rows") or {}).get("held_out_rows")
    if data.source != "file" or not rows:
        return load_records(data, weighing_of(subject.config.composition)).held_out
    try:
        return records_at(data, rows)
    except KeyError as error:
        raise UserError(
            f"prompts=held_out: the run's data has no row {error} any more that was held out; bring the file "
            "back, or give prompts=FILE"
        ) from None


def _check_images(prompts: "list[Prompt]", subject: "Subject", named: str, form: str) -> None:
    """Raise UserError where a model of text alone is asked about an image, or a format has no place for
    one."""
    number = next((number for number, prompt in enumerate(prompts) if prompt.images), None)
    if number is None:
        return
    if form != "jsonl":
        raise UserError(
            f"format={form}: row {number} of the prompts (counted from 0) has an image, for which it has no "
            "place; type format=jsonl"
        )
    if not subject.sees:
        raise UserError(
            f"prompts={named}: row {number} (counted from 0) has an image, and {subject.name} reads text "
            "alone; give a vision-language model, or prompts without images"
        )
    refuse_images(subject.engine, f"row {number} of the prompts (counted from 0) has an image")


def _made_with(settings: argparse.Namespace, subject: "Subject", prompts: "list[Prompt]") -> dict[str, Any]:
    from rcpo.evaluation.generation import digest_of

    keys = (
        "answers", "temperature", "top_p", "seed", "max_new_tokens", "system", "chat_template", "engine",
    )  # fmt: skip
    made_with = {key: getattr(settings, key) for key in keys}
    return made_with | {"prompts": digest_of(prompts), "weights": subject.fingerprint}


def _generate(
    settings: argparse.Namespace,
    subject: "Subject",
    asking: "Asking",
    prompts: Any,
    first: Any,
    partial: Any,
) -> str:
    """The file's text."""
    from rcpo.common.console import RunConsole, work_shown
    from rcpo.evaluation.decoding import Decoding
    from rcpo.evaluation.engines import ANSWERS_AT_ONCE
    from rcpo.evaluation.forms import written
    from rcpo.evaluation.generation import generate

    batch = settings.batch or ANSWERS_AT_ONCE[subject.engine]
    decoding = Decoding(settings.temperature, settings.top_p, settings.max_new_tokens, batch)
    total = settings.answers * sum(1 + len(prompt.later) for prompt in prompts)
    with (
        work_shown(RunConsole(), "generating", total, "answers") as advance,
        subject.writer() as writer,
    ):
        answered = generate(
            writer,
            asking,
            prompts,
            first,
            decoding,
            settings.answers,
            settings.seed,
            partial,
            advance,
        )
    return written(settings.format, answered, settings.name or subject.name, subject.engine)


def write_atomically_or_say(out: Path, text: str) -> None:
    try:
        write_atomically(out, text)
    except OSError as error:
        raise UserError(
            f"out={out}: cannot be written ({error.strerror}); make room and type the same again: the "
            "answers are kept beside it"
        ) from None
