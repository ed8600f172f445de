"""`rcpo judge A B`: which of two models' answers a judge prefers; `rcpo judge SWEEP against=off`: of all
cells, into the runs' folders."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from rcpo.commands.flags import Flags
from rcpo.commands.judge_settings import OF_RUNS, SETTINGS, check
from rcpo.commands.settings import add_settings, split_words
from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from rcpo.evaluation.answer_files import Duel, Joined
    from rcpo.evaluation.classifier_judge import ClassifierJudge
    from rcpo.evaluation.judge import Judge
    from rcpo.evaluation.win_rate import Verdicts


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Let a judge compare two files of answers that `rcpo generate` wrote: how often those of A win, each
pair in both orders, ties as half a win, with 95 % intervals over prompts; plain, and at equal length
(length decides many a judge). What it would cost is said first; nothing is sent without --yes. The
key of a service comes from the environment, OPENAI_API_KEY. Replies are kept and never asked twice.

Of a sweep or of runs, answers that are not there yet are generated first. Every cell is judged against
the calibration=off run of its objective and seed, or against the model that it started from, and
`rcpo compare` has a column of it."""
    parser.epilog = """\
examples:
  rcpo generate RUN prompts=held_out out=a.jsonl
  rcpo judge a.jsonl b.jsonl url=http://localhost:8000/v1 judge=NAME --yes
  rcpo judge a.jsonl b.jsonl model=MODEL
  rcpo judge SWEEP against=off prompts=held_out model=MODEL"""
    add_settings(parser, SETTINGS, "FILE FILE|SWEEP")
    parser.add_argument("--yes", action="store_true", help="send the requests")


def run(options: argparse.Namespace) -> int:
    """Judge; returns the exit code. Raises UserError for bad input, before anything is sent."""
    places, settings = split_words(options.words, SETTINGS)
    if settings.against is not None or any(Path(place).is_dir() for place in places):
        return _judge_runs(places, settings, options.yes)
    if len(places) != 2:
        raise UserError(
            f"{' '.join(places) or 'nothing'}: give two files that `rcpo generate` wrote, or a sweep with "
            "against=off; `rcpo judge --help`"
        )
    for key in OF_RUNS:
        if getattr(settings, key) is not None:
            raise UserError(f"{key}: is for runs, with against=off or against=initial; leave it out")
    check(settings)
    from rcpo.common.console import RunConsole
    from rcpo.evaluation.answer_files import join_answers

    joined = join_answers(Path(places[0]), Path(places[1]))
    console = RunConsole()
    judge = _load_judge(settings)
    name, verdicts = _asked(judge, settings, joined.duels, console, options.yes)
    found = summarise(places, name, joined, verdicts)
    if settings.out is not None:
        _write(settings.out, found, joined.duels, verdicts)
    _print(console, found, has_order=settings.model is None)
    return 0


def _asked(
    judge: "ClassifierJudge | None",
    settings: argparse.Namespace,
    duels: "list[Duel]",
    console: "Console",
    is_agreed: bool,
) -> "tuple[str, list[Verdicts]]":
    """The judge's name and its verdicts."""
    if judge is not None:
        return _classifier(judge, duels, console)
    return settings.judge, _api(settings, duels, console, is_agreed)


def _judge_runs(places: list[str], settings: argparse.Namespace, is_agreed: bool) -> int:
    """All runs of the places against others; returns the exit code."""
    if settings.against is None:
        raise UserError(
            f"against: is missing, and {places[0]} is a folder; type against=off or against=initial"
        )
    if not places:
        raise UserError("nothing to judge; give a sweep or run folders; `rcpo judge --help`")
    if settings.out is not None:
        raise UserError(
            f"out={settings.out}: is for two files; leave it out: verdicts on runs go into their folders"
        )
    for key, value in OF_RUNS.items():
        setattr(settings, key, value if getattr(settings, key) is None else getattr(settings, key))
    check(settings)
    from rcpo.common.console import RunConsole

    console = RunConsole()
    against, left_out = _pairs(places, settings.against)
    if not against:
        why = "; ".join(f"{path}: {reason}" for path, reason in list(left_out.items())[:1])
        raise UserError(f"against={settings.against}: no run here can be judged ({why}); give other runs")
    judge = _load_judge(settings)
    for path, reason in left_out.items():
        console.print(f"left out: {path}: {reason}", soft_wrap=True, markup=False)
    matches = _matches(against, settings, console)
    duels = [duel for match in matches for duel in match.joined.duels]
    name, verdicts = _asked(judge, settings, duels, console, is_agreed)
    column = settings.column or f"win_vs_{settings.against}"
    found = []
    for match in matches:
        own, verdicts = verdicts[: len(match.joined.duels)], verdicts[len(match.joined.duels) :]
        if not any(any(both) for both in own):
            console.print(f"left out: {match.run}: none of its replies can be read", soft_wrap=True)
            continue
        found.append(_keep(match, name, own, column, settings.against))
    _print_runs(console, found, name, settings.model is None)
    console.print(
        f"`rcpo compare {' '.join(places)}` has them as the column {column}", soft_wrap=True, markup=False
    )
    return 0


class _Match(NamedTuple):
    """A run and what it is judged against."""

    run: Path
    other: Path | None
    """The `off` run; None for the model that the run started from."""
    joined: "Joined"


def _pairs(places: list[str], opponent: str) -> tuple[dict[Path, Path | None], dict[Path, str]]:
    """What each run is judged against, None for the model that it started from; why others are left out."""
    from rcpo.comparison.find import find_runs
    from rcpo.comparison.opponents import against_off

    runs = find_runs(places)
    if opponent == "off":
        pairing = against_off(runs)
        return dict(pairing.against), pairing.left_out
    without = {run: "has no final/ yet" for run in runs if not (run / "final").is_dir()}
    return dict.fromkeys(run for run in runs if run not in without), without


def _matches(
    against: dict[Path, Path | None], settings: argparse.Namespace, console: "Console"
) -> "list[_Match]":
    """Runs with the answers of both sides, generated where they are not there."""
    from rcpo.commands.generate import read
    from rcpo.common.console import work_shown
    from rcpo.evaluation.answer_files import join_answers
    from rcpo.evaluation.kept_answers import answers_file
    from rcpo.evaluation.subject import find_subject

    def answers(word: Path, step: str | None) -> Path:
        subject = find_subject(str(word), step)
        prompts = read(settings.prompts, subject)[: settings.limit]
        return answers_file(
            subject, prompts, f"prompts={settings.prompts}", settings.max_new_tokens, settings.batch,
            lambda name, total: work_shown(console, f"{name}: generating", total, "answers"),
        )  # fmt: skip

    found = []
    for run, other in against.items():
        theirs = answers(run, "0") if other is None else answers(other, None)
        found.append(_Match(run, other, join_answers(answers(run, None), theirs)))
    return found


def _keep(match: _Match, name: str, verdicts: "list[Verdicts]", column: str, against: str) -> dict[str, Any]:
    """Into the run's folder; returns all numbers."""
    from rcpo.evaluation.verdicts import keep_even, keep_win_rate

    metric = f"win rate against {against}, by {name},"
    places = [str(match.run), "initial model" if match.other is None else str(match.other)]
    found = summarise(places, name, match.joined, verdicts)
    try:
        keep_win_rate(match.run, column, metric, match.joined.duels, verdicts, found)
        if match.other is not None:
            keep_even(match.other, column, metric, match.joined.duels)
    except OSError as error:
        raise UserError(
            f"{match.run}: verdicts cannot be written ({error.strerror}); make room and type the same again: "
            "replies are kept"
        ) from None
    return found


def _print_runs(console: "Console", found: list[dict[str, Any]], name: str, has_order: bool) -> None:
    from rcpo.sweep.table import new_table

    numbers = ["win rate", "at equal length", "characters", *(["first wins", "unreadable"] * has_order)]
    table = new_table(console, ["run", "against"], numbers)
    for each in found:
        length = each["mean_length"]
        line = [Path(each["a"]).name, Path(each["b"]).name, _rate(each, "win_rate")]
        line += [_rate(each, "win_rate_at_equal_length"), f"{length['a']:.0f} against {length['b']:.0f}"]
        order = each["order"]
        table.add_row(*line, *([f"{order['first']:.0%}", str(order["unreadable"])] if has_order else []))
    console.print(table)
    num = max((each["prompts"] for each in found), default=0)
    console.print(f"by {name}, {num} prompts; 95 % over prompts, a tie is half a win", soft_wrap=True)


def _rate(found: dict[str, Any], key: str) -> str:
    each = found[key]
    return f"{each['value']:.3f} [{each['low']:.3f}, {each['high']:.3f}]"


def _load_judge(settings: argparse.Namespace) -> "ClassifierJudge | None":
    """The reward model. Raises UserError where it, or the client of a server, is not here."""
    if settings.model is None:
        from rcpo.evaluation.chat import refuse_missing_client

        refuse_missing_client(settings.url)
        return None
    from rcpo.evaluation.classifier_judge import ClassifierJudge

    return ClassifierJudge(settings.model)


def _classifier(
    judge: "ClassifierJudge", duels: "list[Duel]", console: "Console"
) -> "tuple[str, list[Verdicts]]":
    from rcpo.common.console import work_shown

    with work_shown(console, "scoring", len(duels), "pairs of answers") as advance:
        return judge.name, judge.ask(duels, advance)


def _api(
    settings: argparse.Namespace, duels: "list[Duel]", console: "Console", is_agreed: bool
) -> "list[Verdicts]":
    from rcpo.common.console import work_shown
    from rcpo.evaluation.chat import ChatSettings
    from rcpo.evaluation.judge import Judge

    asked = ChatSettings(
        settings.url.rstrip("/"),
        settings.judge,
        settings.timeout,
        settings.at_once,
        settings.reply_tokens,
    )
    judge = Judge(asked, duels)
    said, is_free = cost_text(judge, settings)
    if not is_free and not is_agreed:
        raise UserError(f"{said}; nothing was sent: type --yes to send them")
    console.print(said, soft_wrap=True, markup=False)
    with work_shown(console, "judging", judge.cost().requests, "requests") as advance:
        return judge.ask(advance)


def cost_text(judge: "Judge", settings: argparse.Namespace) -> tuple[str, bool]:
    """What asking would cost, and whether there is nothing to ask."""
    cost = judge.cost()
    written = cost.requests * settings.reply_tokens
    said = (
        f"{cost.requests} requests to {settings.url} ({cost.kept} replies are kept): about {cost.tokens} "
        f"tokens, and at most {written} of replies"
    )
    if settings.price is not None:
        read_price, written_price = settings.price
        said += f", at most {(cost.tokens * read_price + written * written_price) / 1e6:.2f} by price="
    if urlsplit(settings.url).hostname not in ("localhost", "127.0.0.1", "::1") and not os.environ.get(
        "OPENAI_API_KEY"
    ):
        said += ", without a key (OPENAI_API_KEY)"
    return said, cost.requests == 0


def summarise(places: list[str], name: str, joined: "Joined", verdicts: "list[Verdicts]") -> dict[str, Any]:
    """All numbers of a comparison."""
    from dataclasses import asdict

    import numpy as np

    from rcpo.evaluation.win_rate import order_of, rates, wins_of

    wins = wins_of(verdicts)
    plain, controlled = rates(wins, np.array([duel.longer for duel in joined.duels], dtype=float))
    return {
        "a": places[0],
        "b": places[1],
        "judge": name,
        "prompts": len(joined.duels),
        "prompts_in_one_file": joined.left_out,
        "prompts_without_verdict": int(np.isnan(wins).sum()),
        "win_rate": asdict(plain),
        "win_rate_at_equal_length": asdict(controlled),
        "mean_length": {
            side: float(np.mean([len(getattr(duel, side)) for duel in joined.duels])) for side in ("a", "b")
        },
        "order": asdict(order_of(verdicts)),
    }


def _write(out: Path, found: dict[str, Any], duels: "list[Duel]", verdicts: "list[Verdicts]") -> None:
    rows = [
        {"prompt": duel.prompt, "a": duel.a, "b": duel.b, "a_first": both[0], "b_first": both[1]}
        for duel, both in zip(duels, verdicts, strict=True)
    ]
    try:
        write_atomically(out, json.dumps(found | {"rows": rows}, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(
            f"out={out}: cannot be written ({error.strerror}); make room and type the same again: replies "
            "are kept"
        ) from None


def _print(console: "Console", found: dict[str, Any], has_order: bool) -> None:
    def line(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    order, length = found["order"], found["mean_length"]
    line(f"{found['a']} against {found['b']}, by {found['judge']}: {found['prompts']} prompts")
    line(f"win rate            {_rate(found, 'win_rate')}   (95 %, over prompts; a tie is half a win)")
    line(f"at equal length     {_rate(found, 'win_rate_at_equal_length')}   (logistic regression on length)")
    line(f"characters          {length['a']:.0f} against {length['b']:.0f} an answer")
    if has_order:
        line(
            f"by order            the first wins {order['first']:.0%}, the second {order['second']:.0%}, "
            f"ties {order['tie']:.0%}; the same winner in both orders {order['consistent']:.0%}"
        )
    for key, said in (
        ("prompts_in_one_file", "prompts are in one file only, and left out"),
        ("prompts_without_verdict", "prompts have no verdict that can be read, and are left out"),
    ):
        if found[key]:
            line(f"{found[key]} {said}")
    if has_order and order["unreadable"]:
        line(f"{order['unreadable']} of {2 * found['prompts']} replies cannot be read")
