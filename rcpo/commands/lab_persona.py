"""`rcpo lab persona [MODEL]`: prompts answered with one token, each objective with each calibration."""

import argparse
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.commands.settings import Setting, names, whole_number
from rcpo.common.errors import UserError, shortened
from rcpo.common.files import write_atomically

if TYPE_CHECKING:
    from rcpo.evaluation.one_token import Watched, Words
    from rcpo.evaluation.subject import Loaded, Subject

BUILTIN = "builtin:tiny"
ROWS_PER_HELD_OUT = 4
"""One of so many prompts is held out."""
LARGEST_STEP = 8
WORDS_OF_ALL = {
    "data": "file",
    "data.append_eos": "false",
    "data.on_bad_row": "error",
    "optim": "rmsprop",
    "train.steps": "30",
    "train.eval_every": "10",
    "tracking": "none",
}
"""Of every cell, where the user gives no other."""
_PAIR = re.compile(r"([^/\s]+)/([^/\s]+)")


def word_pairs(text: str) -> list[tuple[str, str]]:
    """Yes/No,No/Never."""
    found = []
    for part in text.split(","):
        match = _PAIR.fullmatch(part.strip())
        if match is None or match[1] == match[2]:
            raise ValueError("must be two different words each, as in Yes/No,No/Never")
        found.append((match[1], match[2]))
    return list(dict.fromkeys(found))


SETTINGS = (
    Setting("prompts", "a .json or .jsonl file; for the model that ships, word problems by default"),
    Setting("pairs", "CHOSEN/REJECTED,... words of one token (default: Yes/No,No/Never)", word_pairs),
    Setting("objectives", "names (default: dpo)", names, ["dpo"]),
    Setting("calibrations", "names (default: off,balance)", names, ["off", "balance"]),
    Setting("seeds", "numbers (default: 0)", names, ["0"]),
    Setting("alone", "each of the first so many prompts trained by itself, as in the paper", whole_number(1)),
    Setting("out", "the folder for all of it; default: lab-out/persona", Path, Path("lab-out/persona")),
    Setting("parallel", "so many runs at a time (default: 1)", whole_number(1), 1),
    Setting("top", "tokens to list (default: 5)", whole_number(1), 5),
    Setting("batch", "prompts at once where tokens are looked at (default: 16)", whole_number(1), 16),
)


def run(place: str | None, words: Sequence[str], settings: argparse.Namespace) -> int:
    """Train all, measure all; returns the exit code. Raises UserError for bad input, before weights are
    loaded."""
    from rcpo.models.places import refuse_no_run_or_model

    model = place or BUILTIN
    refuse_no_run_or_model(model)
    from rcpo.commands.lab_sweep import FINISHED, checked_grid, look_at_grid, run_cells

    look_at_grid(model, settings, words)
    from rcpo.common.console import RunConsole
    from rcpo.evaluation.one_token import Words
    from rcpo.evaluation.subject import find_subject

    subject = find_subject(model)
    refuse_run(subject, model)
    if settings.prompts is None and model != BUILTIN:
        raise UserError(f"prompts: is missing, and {model} has none of its own; type prompts=FILE")
    pairs = [Words(*each) for each in settings.pairs or _default_pairs(model, settings.prompts)]
    files, texts, num_prompts = _pair_files(subject, pairs, settings)
    as_chat = "false" if settings.prompts is None else "null"
    own = dict(WORDS_OF_ALL) | {"model.path": model, "data.as_chat": as_chat}
    num_held_out = max(1, num_prompts // ROWS_PER_HELD_OUT)
    num_trained = 1 if settings.alone else num_prompts - num_held_out
    own |= {"data.eval_pairs": str(num_held_out), "train.pairs_per_step": str(min(LARGEST_STEP, num_trained))}
    axes: dict[str, Any] = {
        "pair": [
            {"label": label, "overrides": [f"{key}={_quoted(path)}" for key, path in paths.items()]}
            for label, paths in files.items()
        ],
        "objective": settings.objectives,
        "calibration": settings.calibrations,
    }
    definition = checked_grid("persona", axes, settings, own, words)
    _write(texts, settings.out)
    code, sweep = run_cells(definition, settings)
    if code not in FINISHED:
        return code
    watch = _Watch(subject, settings)
    found = [
        {"cell": cell.name, **cell.axes, **watch.measured(sweep.run(cell).path)}
        for cell in sweep.read_cells()
        if sweep.run(cell).final.is_dir() and cell.axes.get("pair") in files
    ]
    file = settings.out / "persona.json"
    write_atomically(file, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    _print(RunConsole(), found)
    print(f"wrote {file}")
    return code


def refuse_run(subject: "Subject", word: str) -> None:
    """Raise UserError for a run where a model is wanted."""
    if subject.run is not None:
        raise UserError(f"{word}: is a run folder, and the experiment trains runs of its own; give a model")


def _default_pairs(model: str, prompts: str | None) -> list[tuple[str, str]]:
    """Opposites, and words of like meaning."""
    if model == BUILTIN and prompts is None:
        return [("seven", "one"), ("seven", "eight")]
    return [("Yes", "No"), ("No", "Never")]


def _pair_files(
    subject: "Subject", pairs: "Sequence[Words]", settings: argparse.Namespace
) -> tuple[dict[str, dict[str, Path]], dict[Path, str], int]:
    """For each value of the axis the files that its runs read, under their keys; the texts of all files;
    and how many prompts there are. Raises UserError where they cannot be made."""
    from rcpo.evaluation.one_token import builtin_prompts, rows_of, tokens_of
    from rcpo.evaluation.prompts import read_prompts

    tokenizer = subject.tokenizer()
    files: dict[str, dict[str, Path]] = {}
    texts: dict[Path, str] = {}
    num_prompts = 0
    for words in pairs:
        if settings.prompts is None:
            prompts = builtin_prompts(words, tokenizer)
        else:
            prompts = [prompt.opening for prompt in read_prompts(Path(settings.prompts))]
            if tokenizer.chat_template is not None:
                prompts = [
                    [{"role": "user", "content": each}] if isinstance(each, str) else each for each in prompts
                ]
        rows = rows_of(prompts, words)
        tokens_of(rows, tokenizer, words)
        num_prompts = len(rows)
        if num_prompts < 2:
            raise UserError(
                f"prompts={settings.prompts}: has one prompt, and one is held out; give two or more"
            )
        if settings.alone and settings.alone >= num_prompts:
            raise UserError(
                f"alone={settings.alone}: needs a prompt more, and there are {num_prompts}; type a lower one"
            )
        folder = settings.out / "pairs"
        if not settings.alone:
            files[words.label] = {"data.path": (folder / f"{words.label}.jsonl").absolute()}
            texts[files[words.label]["data.path"]] = _lines(rows)
        for number in range(settings.alone or 0):
            label = f"{words.label}-{number}"
            own = {
                "data.path": (folder / f"{label}.jsonl").absolute(),
                "data.eval_path": (folder / f"{label}-others.jsonl").absolute(),
            }
            files[label] = own
            texts[own["data.path"]] = _lines([rows[number]])
            texts[own["data.eval_path"]] = _lines(rows[:number] + rows[number + 1 :])
    return files, texts, num_prompts


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(texts: dict[Path, str], out: Path) -> None:
    for path, text in texts.items():
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise UserError(f"out={out}: {path} has other prompts; give another out=FOLDER")
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror}); give another out=FOLDER") from None


def _quoted(path: Path) -> str:
    """As Hydra's grammar reads it."""
    text = str(path)
    if "'" in text:
        raise UserError(f"out={shortened(text)}: has a quote in it; give another out=FOLDER")
    return f"'{text}'"


class _Watch:
    """Looks at trained models beside the one that they started from, which is loaded once."""

    def __init__(self, subject: "Subject", settings: argparse.Namespace) -> None:
        self._subject, self._settings = subject, settings

    @cached_property
    def _first(self) -> "Loaded":
        from rcpo.evaluation.subject import Loaded

        return Loaded(self._subject)

    @cached_property
    def _before(self) -> "Watched":
        from rcpo.evaluation.one_token import Watched

        return Watched(self._first.model, self._first.asking.pad_id, self._settings.batch)

    def measured(self, run: Path) -> dict[str, Any]:
        """Of one run, kept in RUN/lab/persona.json."""
        from rcpo.evaluation import one_token_course as course
        from rcpo.evaluation.one_token import Watched, measure
        from rcpo.evaluation.subject import find_subject
        from rcpo.training.read_inputs import tokenise

        file, top = run / "lab" / "persona.json", self._settings.top
        if file.is_file():
            known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if known.get("top") == top and "course" in known["held_out"]:
                return known
        trained = find_subject(str(run))
        assert trained.config is not None
        tokenizer = self._first.tokenizer
        pairs = tokenise(trained.config, tokenizer)
        after = Watched(trained.load(), self._first.asking.pad_id, self._settings.batch)
        found: dict[str, Any] = {"top": top}
        for name, of_split in (("trained", pairs.train.pairs), ("held_out", pairs.held_out.pairs)):
            found[name] = measure(self._before, after, of_split, tokenizer, top)
        assert trained.run is not None
        found["held_out"] |= course.summary(course.of_held_out(trained.run))
        if len(pairs.train.pairs) == 1:
            at_end = found["trained"]["chosen"]["after"] if trained.config.train.keep_best is None else None
            found["trained"] |= course.summary(course.of_one_prompt(trained.run, at_end))
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return found


def _shown(numbers: dict[str, Any]) -> tuple[str, ...]:
    chosen, rejected = (
        f"{numbers[side]['before']:.3f} -> {numbers[side]['after']:.3f}" for side in ("chosen", "rejected")
    )
    lowest = numbers["lowest"]
    return chosen, f"{lowest['p']:.3f}", str(lowest["step"]), rejected, f"{numbers['fell']:.0%}"


def _means(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the prompts that were trained by themselves with the same words, objective, calibration and seed;
    none where there is one alone."""
    from rcpo.evaluation.one_token_course import mean_of

    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for each in found:
        label = str(each["pair"]).rpartition("-")[0]
        key = (label, *(str(each[axis]) for axis in ("objective", "calibration", "seed")))
        alike.setdefault(key, []).append(each)
    return [
        members[0] | {"pair": f"{key[0]}, mean of {len(members)}"}
        | {"trained": mean_of([each["trained"] for each in members])}
        for key, members in alike.items()
        if len(members) > 1
    ]  # fmt: skip


def _print(console: Any, found: Sequence[dict[str, Any]]) -> None:
    from rcpo.sweep.table import new_table

    if not found:
        return
    is_alone = any(each["trained"]["prompts"] == 1 for each in found)
    which = "trained" if is_alone else "held_out"
    several = len({each["seed"] for each in found}) > 1
    columns = ["pair", "objective", "calibration", *(["seed"] if several else [])]
    table = new_table(console, columns, ["p(chosen)", "lowest", "at step", "p(rejected)", "fell"])
    for each in [*found, *(_means(found) if is_alone else [])]:
        table.add_row(*(str(each[column]) for column in columns), *_shown(each[which]))
    said = "the trained prompt" if is_alone else f"{found[0][which]['prompts']} held-out prompts"
    looked = "step" if is_alone else "evaluation"
    console.print(
        f"\nof {said}; lowest: the smallest p(chosen) of every {looked}; fell: the share of prompts whose "
        "chosen token did, by the end",
        soft_wrap=True,
    )
    console.print(table)
    for each in found:
        numbers = each[which]
        gained = ", ".join(f"{token['token']!r} {token['change']:+.3f}" for token in numbers["gained"][:3])
        theory = ", ".join(repr(token["token"]) for token in numbers["theory"][:3])
        console.print(
            f"{each['cell']}: gained most {gained or 'none'}; theory names {theory}",
            soft_wrap=True,
            markup=False,
        )
