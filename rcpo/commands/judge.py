"""`rcpo judge A B`: which of two models' answers a judge prefers."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rcpo.commands.flags import Flags, check_writable
from rcpo.commands.settings import Setting, add_settings, split_words, whole_number
from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from rcpo.evaluation.answer_files import Duel, Joined
    from rcpo.evaluation.judge import Judge
    from rcpo.evaluation.win_rate import Verdicts


def prices(text: str) -> tuple[float, float]:
    """Of a million tokens that are read, and that are written."""
    try:
        read, written = map(float, text.split(","))
    except ValueError:
        raise ValueError("must be two numbers, as in price=2.5,10") from None
    if not (0 <= read <= 1e6 and 0 <= written <= 1e6):
        raise ValueError("must be two numbers from 0 to a million")
    return read, written


SETTINGS = (
    Setting("url", "the chat API of a judge, as OpenAI's: http://localhost:8000/v1"),
    Setting("judge", "the judge's name there"),
    Setting("model", "in place of both a local reward model: a folder or a hub id"),
    Setting("out", "a .json file for the verdicts, prompt by prompt", Path),
    Setting("price", "READ,WRITTEN of a million tokens, for what is said of costs", prices),
    Setting("timeout", "seconds that a reply may take (default: 60)", whole_number(1), 60),
    Setting("at_once", "requests that are open together (default: 4)", whole_number(1), 4),
    Setting("reply_tokens", "tokens of a reply, at most (default: 64)", whole_number(1), 64),
)


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Let a judge compare two files of answers that `rcpo generate` wrote: how often those of A win, each
pair in both orders, ties as half a win, with 95 % intervals over prompts; plain, and at equal length
(length decides many a judge). What it would cost is said first; nothing is sent without --yes. The
key of a service comes from the environment, OPENAI_API_KEY. Replies are kept and never asked twice."""
    parser.epilog = """\
examples:
  rcpo generate RUN prompts=held_out out=a.jsonl
  rcpo judge a.jsonl b.jsonl url=http://localhost:8000/v1 judge=NAME --yes
  rcpo judge a.jsonl b.jsonl model=MODEL"""
    add_settings(parser, SETTINGS, "FILE FILE")
    parser.add_argument("--yes", action="store_true", help="send the requests")


def run(options: argparse.Namespace) -> int:
    """Judge; returns the exit code. Raises UserError for bad input, before anything is sent."""
    places, settings = split_words(options.words, SETTINGS)
    if len(places) != 2:
        raise UserError(
            f"{' '.join(places) or 'nothing'}: give two files that `rcpo generate` wrote; `rcpo judge --help`"
        )
    _check(settings)
    from rcpo.common.console import RunConsole
    from rcpo.evaluation.answer_files import join_answers

    joined = join_answers(Path(places[0]), Path(places[1]))
    console = RunConsole()
    if settings.model is not None:
        name, verdicts = _classifier(settings, joined.duels, console)
    else:
        name = settings.judge
        verdicts = _api(settings, joined.duels, console, options.yes)
    found = summarise(places, name, joined, verdicts)
    if settings.out is not None:
        _write(settings.out, found, joined.duels, verdicts)
    _print(console, found, has_order=settings.model is None)
    return 0


def _check(settings: argparse.Namespace) -> None:
    if settings.model is not None:
        if settings.url is not None or settings.judge is not None:
            raise UserError(f"model={settings.model}: is a judge by itself; leave out url and judge")
    elif settings.url is None or settings.judge is None:
        missing = "url" if settings.url is None else "judge"
        raise UserError(f"{missing}: is missing; type url=URL and judge=NAME, or model=MODEL")
    else:
        parts = urlsplit(settings.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"url={settings.url}: is no address; type url=http://HOST:PORT/v1")
        if parts.username or parts.password:
            raise UserError("url: must not hold a key or password; set OPENAI_API_KEY in the environment")
    if settings.out is not None:
        if settings.out.suffix != ".json":
            raise UserError(f"out={settings.out}: must end in .json; type out={settings.out.stem}.json")
        check_writable("out", settings.out)


def _classifier(
    settings: argparse.Namespace, duels: "list[Duel]", console: "Console"
) -> "tuple[str, list[Verdicts]]":
    from rcpo.common.console import work_shown
    from rcpo.evaluation.classifier_judge import ClassifierJudge

    judge = ClassifierJudge(settings.model)
    with work_shown(console, "scoring", len(duels), "pairs of answers") as advance:
        return judge.name, judge.ask(duels, advance)


def _api(
    settings: argparse.Namespace, duels: "list[Duel]", console: "Console", is_agreed: bool
) -> "list[Verdicts]":
    from rcpo.common.console import work_shown
    from rcpo.evaluation.judge import Judge, JudgeSettings

    asked = JudgeSettings(
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

    def rate(key: str) -> str:
        each = found[key]
        return f"{each['value']:.3f} [{each['low']:.3f}, {each['high']:.3f}]"

    order, length = found["order"], found["mean_length"]
    line(f"{found['a']} against {found['b']}, by {found['judge']}: {found['prompts']} prompts")
    line(f"win rate            {rate('win_rate')}   (95 %, over prompts; a tie is half a win)")
    line(f"at equal length     {rate('win_rate_at_equal_length')}   (logistic regression on the difference)")
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
