"""`rcpo lab refusal MODEL prompts=FILE`: a model's own answers as pairs in which the refusal is chosen, and
how often it refuses once it is trained on them."""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.commands import lab_labels
from rcpo.commands.settings import Setting, names, number_in, one_of, whole_number
from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically

if TYPE_CHECKING:
    from rcpo.evaluation.refusals import Labeller
    from rcpo.evaluation.subject import Subject
    from rcpo.sweep.folder import SweepFolder

SCORES = "scores.parquet"
ROWS_PER_HELD_OUT = 4
"""One of so many prompts is held out."""
LARGEST_STEP = 8
WORDS_OF_ALL = {"data": "file", "data.as_chat": "false", "optim": "adamw", "tracking": "none"}
"""Of every run, where the user gives no other."""
SETTINGS = (
    Setting("prompts", "a .json or .jsonl file of prompts; needed"),
    *lab_labels.SETTINGS,
    Setting("ties", "both refuse, or none: draw (default) or drop; a classifier's scores come first",
            one_of(("draw", "drop")), "draw", ("draw", "drop")),
    Setting("temperature", "of the two answers (default: 1)", number_in(1e-6, 100), 1.0),
    Setting("max_new_tokens", "of an answer (default: 128)", whole_number(1), 128),
    Setting("ches", "trains too on those up to this percentile of CHES per token", number_in(0, 100)),
    Setting("objectives", "names (default: dpo)", names, ["dpo"]),
    Setting("calibrations", "names (default: off,balance)", names, ["off", "balance"]),
    Setting("seeds", "numbers (default: 0)", names, ["0"]),
    Setting("out", "the folder for all of it; default: lab-out/refusal", Path, Path("lab-out/refusal")),
    Setting("parallel", "so many runs at a time (default: 1)", whole_number(1), 1),
    Setting("batch", "prompts at once (default: 16)", whole_number(1), 16),
)  # fmt: skip


def run(place: str | None, words: Sequence[str], settings: argparse.Namespace) -> int:
    """Answer, label, pair, train, and answer again; returns the exit code. Raises UserError for bad input,
    before weights are loaded. What is in OUT already is not done again."""
    if place is None:
        raise UserError("model: is missing; type rcpo lab refusal MODEL prompts=FILE")
    if settings.prompts is None:
        raise UserError("prompts: is missing, and rcpo has none; type prompts=FILE")
    lab_labels.check(settings)
    from rcpo.models.places import refuse_no_run_or_model

    refuse_no_run_or_model(place)
    from rcpo.commands.lab_persona import refuse_run
    from rcpo.commands.lab_sweep import FINISHED, checked_grid, key_of, look_at_grid, run_cells

    look_at_grid(place, settings, words)
    from rcpo.evaluation.subject import find_subject

    subject = find_subject(place)
    refuse_run(subject, place)
    out: Path = settings.out
    own = dict(WORDS_OF_ALL) | {
        "model.path": place,
        "data.path": f"'{(out / 'pairs.jsonl').absolute()}'",
        "data.eval_path": f"'{(out / 'held_out.jsonl').absolute()}'",
    }
    if not {"train.steps", "train.epochs"} & set(map(key_of, words)):
        own["train.epochs"] = "1"
    axes: dict[str, Any] = {"objective": settings.objectives, "calibration": settings.calibrations}
    if settings.ches is not None:
        limits = {
            "scores": f"'{(out / SCORES).absolute()}'",
            "ches_norm_max_percentile": f"{settings.ches:g}",
        }
        few = {
            "label": f"ches{settings.ches:g}",
            "overrides": [f"data.filter.{key}={value}" for key, value in limits.items()],
        }
        axes["pairs"] = [{"label": "all", "overrides": ["data.filter.scores=null"]}, few]
    checked_grid("refusal", axes, settings, own, words)
    labeller = lab_labels.load(settings)
    _begin(subject, settings, math.prod(map(len, axes.values())) * len(settings.seeds))
    drawn = {"answers": 2, "temperature": settings.temperature}
    _generate(place, out / "prompts.jsonl", out / "answers.jsonl", settings, **drawn)
    counts = _write_pairs(out, labeller, settings)
    own["train.pairs_per_step"] = str(min(LARGEST_STEP, counts["pairs"]))
    if settings.ches is not None:
        _score(out / SCORES, own, words)
    code, sweep = run_cells(checked_grid("refusal", axes, settings, own, words), settings)
    if code not in FINISHED:
        return code
    found = _rates(place, sweep, labeller, settings)
    file = out / "refusal.json"
    tree = {
        "labeller": labeller.name, "unreadable": labeller.unreadable, "pairs": counts, "rates": found
    }  # fmt: skip
    write_atomically(file, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    _print(tree)
    print(f"wrote {file}")
    return code


def _begin(subject: "Subject", settings: argparse.Namespace, num_runs: int) -> None:
    """OUT with the prompts, trained ones first, and what it is made with. Raises UserError where it was begun
    with other words."""
    from rcpo.evaluation.generation import digest_of
    from rcpo.evaluation.prompts import read_prompts

    prompts = read_prompts(Path(settings.prompts))
    if len(prompts) < 2 * ROWS_PER_HELD_OUT:
        raise UserError(
            f"prompts={settings.prompts}: has {len(prompts)} prompts, and one of {ROWS_PER_HELD_OUT} is held "
            f"out; give {2 * ROWS_PER_HELD_OUT} or more"
        )
    lab_labels.agree(settings, [_conversation(prompt.opening) for prompt in prompts], num_runs)
    keys = ("temperature", "max_new_tokens", "classifier", "threshold", "ties", "phrases", "url", "judge")
    made_with = {key: getattr(settings, key) for key in keys} | {"prompts": digest_of(prompts)}
    if settings.phrases is not None:
        made_with["phrases"] = hashlib.sha256(
            "\n".join(lab_labels.phrases_of(settings.phrases)).encode()
        ).hexdigest()[:16]
    made_with["weights"] = subject.fingerprint
    file = settings.out / "begun.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        other = [key for key in made_with if before.get(key) != made_with[key]]
        if other:
            raise UserError(
                f"out={settings.out}: was begun with other {', '.join(other)}; type the same to go on, or "
                "give another out=FOLDER"
            )
        return
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)
    num_held_out = len(order) // ROWS_PER_HELD_OUT
    rows = [
        {"prompt": prompts[idx].opening, "held_out": place < num_held_out} for place, idx in enumerate(order)
    ]
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        write_atomically(settings.out / "prompts.jsonl", _lines(rows))
        write_atomically(file, json.dumps(made_with) + "\n")
    except OSError as error:
        raise UserError(
            f"out={settings.out}: cannot be written ({error.strerror}); give another out=FOLDER"
        ) from None


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _generate(
    model: str,
    prompts: Path,
    out: Path,
    settings: argparse.Namespace,
    *,
    answers: int,
    temperature: float,
) -> None:
    """`rcpo generate`, where its file is not there yet."""
    if out.is_file():
        return
    from rcpo.commands import generate

    words = [model, f"prompts={prompts}", f"out={out}", f"answers={answers}", f"temperature={temperature}",
             f"max_new_tokens={settings.max_new_tokens}", f"batch={settings.batch}"]  # fmt: skip
    generate.run(argparse.Namespace(words=words, overwrite=False))


def _write_pairs(out: Path, labeller: "Labeller", settings: argparse.Namespace) -> dict[str, int]:
    """OUT/pairs.jsonl and OUT/held_out.jsonl, made again from the answers; what became of the prompts that
    are trained on. Raises UserError where no pair is left."""
    from rcpo.evaluation.json_rows import json_rows
    from rcpo.evaluation.refusals import Answered, make_pairs

    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in json_rows(out / "answers.jsonl", str(out / "answers.jsonl")):
        by_prompt.setdefault(row["index"], []).append(row)
    parts: dict[bool, list[Answered]] = {False: [], True: []}
    rows = [row for both in by_prompt.values() for row in both]
    labels = iter(labeller.labels([(_conversation(row["prompt"]), row["response"]) for row in rows]))
    for first, second in by_prompt.values():
        said = (first["response"], second["response"])
        parts[first["held_out"]].append(Answered(first["prompt"], said, (next(labels), next(labels))))
    counts: dict[str, int] = {}
    for is_held_out, name in ((False, "pairs"), (True, "held_out")):
        pairs, found = make_pairs(parts[is_held_out], settings.ties, 0)
        if not pairs:
            shown = ", ".join(f"{number} {what}" for what, number in found.items() if number)
            raise UserError(
                f"prompts={settings.prompts}: no pair is left for {name}.jsonl ({shown}); "
                "give more prompts, or another temperature"
            )
        write_atomically(out / f"{name}.jsonl", _lines(pairs))
        counts[name] = len(pairs)
        counts |= found if not is_held_out else {}
    counts["answers cut"] = sum(not row["finished"] for rows in by_prompt.values() for row in rows)
    return counts


def _conversation(asked: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else asked


def _score(file: Path, own: dict[str, str], words: Sequence[str]) -> None:
    """`rcpo score` of the pairs, where its file is not there yet."""
    if file.is_file():
        return
    from rcpo.commands import score
    from rcpo.commands.lab_sweep import key_of

    given = set(map(key_of, words))
    of_score = [f"{key}={value}" for key, value in own.items() if key not in given]
    score.run(argparse.Namespace(hydra=[], words=[*of_score, *words], out=file, overwrite=True))


def _rates(
    model: str, sweep: "SweepFolder", labeller: "Labeller", settings: argparse.Namespace
) -> list[dict[str, Any]]:
    """Of the model before training and of every run that is done: greedy answers, and which refuse."""
    prompts = settings.out / "prompts.jsonl"
    found = [{"cell": None} | _rate(model, prompts, settings.out / "initial.jsonl", labeller, settings)]
    for cell in sweep.read_cells():
        run = sweep.run(cell)
        if run.final.is_dir():
            (run.path / "lab").mkdir(exist_ok=True)
            of_cell = _rate(str(run.path), prompts, run.path / "lab" / "refusal.jsonl", labeller, settings)
            found.append({"cell": cell.name, **cell.axes, **of_cell})
    return found


def _rate(
    model: str, prompts: Path, out: Path, labeller: "Labeller", settings: argparse.Namespace
) -> dict[str, Any]:
    from rcpo.evaluation.json_rows import json_rows

    _generate(model, prompts, out, settings, answers=1, temperature=0.0)
    refuses: dict[bool, list[bool]] = {False: [], True: []}
    rows = json_rows(out, str(out))
    labels = labeller.labels([(_conversation(row["prompt"]), row["response"]) for row in rows])
    for row, label in zip(rows, labels, strict=True):
        refuses[row["held_out"]].append(label.refuses)
    lengths = [row["tokens"] for row in rows]
    return {
        "trained": _share(refuses[False]),
        "held_out": _share(refuses[True]),
        "tokens": sum(lengths) / len(lengths),
    }


def _share(values: Sequence[bool]) -> dict[str, float]:
    share = sum(values) / len(values)
    return {
        "prompts": len(values),
        "rate": share,
        "error": (share * (1 - share) / max(1, len(values) - 1)) ** 0.5,
    }


def _print(tree: dict[str, Any]) -> None:
    from rcpo.common.console import RunConsole
    from rcpo.sweep.table import new_table

    console = RunConsole()
    said = ", ".join(f"{number} {what}" for what, number in tree["pairs"].items() if number)
    console.print(f"\npairs: {said}", soft_wrap=True)
    rates = tree["rates"]
    several = len({each.get("seed") for each in rates if each["cell"] is not None}) > 1
    axes = [
        key
        for key in ("objective", "calibration", "pairs", *(["seed"] if several else []))
        if any(key in each for each in rates)
    ]
    table = new_table(console, axes, ["trained prompts", "held out", "tokens"])
    for each in rates:
        shown = [str(each.get(key, "")) for key in axes]
        if each["cell"] is None:
            shown[0] = "before"
        table.add_row(
            *shown, *(_shown(each[part]) for part in ("trained", "held_out")), f"{each['tokens']:.1f}"
        )
    first = rates[0]
    console.print(
        f"\nrefusals by {tree['labeller']}, of {first['trained']['prompts']} trained prompts and "
        f"{first['held_out']['prompts']} held out:",
        soft_wrap=True,
    )
    console.print(table)
    if tree["unreadable"]:
        console.print(f"{tree['unreadable']} replies cannot be read, and count as no refusal", soft_wrap=True)


def _shown(share: dict[str, float]) -> str:
    return f"{share['rate']:.1%} ± {share['error']:.1%}"
