"""From a data config to preference records: training pairs, held-out pairs, and what became of the rows.

Owns the checks on columns, the policy on bad rows, duplicates and the choice of held-out pairs.
`rcpo.data.reading` reads, `rcpo.data.records` judges single rows. Called by `rcpo.training.read_inputs`; the
same config gives the same records on every rank."""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rcpo.common.errors import UserError
from rcpo.config.schema import DataConfig
from rcpo.data.arithmetic import arithmetic_records
from rcpo.data.messages import parsed_quietly, unused_keys
from rcpo.data.mixture import drawn
from rcpo.data.reading import shapes
from rcpo.data.reading.places import Place, held_out_place, mixed_place, training_place
from rcpo.data.reading.readers import Rows, read_rows
from rcpo.data.reading.shapes import Shape
from rcpo.data.records import BadRowError, PreferenceRecord, as_messages, read_record
from rcpo.data.weights import UNWEIGHTED, WEIGHT_PARTS, Weighing, describe_weights

PARTS = ("prompt", "chosen", "rejected")
FOR_TEMPLATES = ("tools", "documents", "chat_template_kwargs")
"""Columns that a chat template is handed, where they are there."""


@dataclass(frozen=True)
class PreferenceData:
    """Training and held-out pairs; no pair is in both."""

    train: list[PreferenceRecord]
    held_out: list[PreferenceRecord]
    report: list[str]
    """Lines for the log: rows read, dropped and why, duplicates, held out."""
    dropped: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Rows of the training source that cannot train, by reason."""


def load_records(config: DataConfig, weighing: Weighing = UNWEIGHTED) -> PreferenceData:
    """Read the pairs that `config` names and hold some out.

    Held-out pairs are those of data.eval_path or data.eval_split (at most data.eval_pairs of them, drawn by
    data.seed), else data.eval_pairs pairs drawn by data.seed from the training pairs. A training pair
    identical to a held-out one is dropped. data.train_pairs draws that many of the rest by data.seed, since
    many files are sorted; it never moves the held-out set. Pairs keep their order. Training pairs have
    the weights that `weighing` reads. Raises UserError with one line for bad input.
    """
    _check_parts(config, weighing)
    if config.source == "arithmetic":
        return _load_arithmetic(config)
    report: list[str] = []
    train, dropped = _read_training(config, report, weighing)
    if (place := held_out_place(config)) is None:
        train, held_out = _draw_held_out(train, config, report)
    else:
        held_out = _read_held_out(place, config, report)
    train = _drop_held_out(train, held_out, report)
    if not train:
        raise UserError(
            f"{_named(config)}: no training pair is left beside {len(held_out)} held-out pairs; "
            "give more rows, or type a smaller data.eval_pairs=N"
        )
    if config.train_pairs is not None and config.train_pairs < len(train):
        report.append(f"{config.train_pairs} of {len(train)} training pairs drawn by data.seed={config.seed}")
        train = _draw(train, config.train_pairs, config.seed)[0]
    if weighing.parts:
        report.append(_describe_weights(train, weighing))
    return PreferenceData(train, held_out, report, dropped)


def _load_arithmetic(config: DataConfig) -> PreferenceData:
    if config.path is not None:
        raise UserError(f"data.path={config.path}: data=arithmetic reads no file; type data=file")
    if config.columns:
        raise UserError("data.columns: data=arithmetic has no columns; type data=file data.path=PAIRS.jsonl")
    if config.train_pairs is None:
        raise UserError("data.train_pairs=null: data=arithmetic needs a number; type data.train_pairs=2048")
    train, held_out = arithmetic_records(config.train_pairs, config.eval_pairs, config.seed)
    return PreferenceData(
        train, held_out, [f"arithmetic: {len(train)} training and {len(held_out)} held-out pairs"]
    )


def _named(config: DataConfig) -> str:
    """Where training pairs are read from, for errors."""
    return "data.mix" if config.mix is not None else f"data.path={training_place(config).shown}"


def _read_training(
    config: DataConfig, report: list[str], weighing: Weighing
) -> tuple[list[PreferenceRecord], dict[str, list[int]]]:
    """Training records of one place, or of a mixture, whose rows are numbered as if its sources lay one
    behind the other."""
    if config.mix is None:
        return _read_place(training_place(config), config, report, weighing)[:2]
    sources, dropped, start = [], dict[str, list[int]](), 0
    for part in config.mix:
        of_part = dataclasses.replace(config, columns=part.columns or config.columns)
        try:
            _check_parts(of_part, weighing)
            records, lost, num_rows = _read_place(mixed_place(part), of_part, report, weighing)
        except UserError as error:
            raise UserError(f"data.mix: {error}") from error.__cause__
        sources.append([dataclasses.replace(record, row=record.row + start) for record in records])
        for reason, rows in lost.items():
            dropped.setdefault(reason, []).extend(row + start for row in rows)
        start += num_rows
    return drawn(config.mix, sources, config.seed, report, NOTE), dropped


def _read_held_out(place: Place, config: DataConfig, report: list[str]) -> list[PreferenceRecord]:
    records, _, _ = _read_place(place, config, report, UNWEIGHTED)
    if len(records) > config.eval_pairs:
        report.append(
            f"{config.eval_pairs} of {len(records)} held-out pairs drawn by data.seed={config.seed}"
        )
        records = _draw(records, config.eval_pairs, config.seed)[0]
    return records


def _read_place(
    place: Place, config: DataConfig, report: list[str], weighing: Weighing
) -> tuple[list[PreferenceRecord], dict[str, list[int]], int]:
    """Records of one source, the rows that are none by reason, and the number of rows that there are, slices
    aside; bad rows stop or are dropped as data.on_bad_row says."""
    parts = (*PARTS, *FOR_TEMPLATES, *weighing.parts)
    names = {part: (config.columns or {}).get(part, part) for part in parts}
    is_named = any(part in PARTS for part in config.columns or {})
    source = read_rows(place, set(names.values()) | (set() if is_named else shapes.COLUMNS))
    shape = (
        shapes.own_shape(source, names)
        if is_named
        else shapes.shape_of(source, names, config.as_chat is False)
    )
    _check_columns(source.columns, shape, place, config)
    records, dropped = _read_records(source, shape, place, config, weighing)
    reasons = Counter({reason: len(rows) for reason, rows in dropped.items()})
    if not records:
        reason, _ = reasons.most_common(1)[0]
        raise place.error(
            f"none of its {len(source.rows)} rows can train ({reason}); give pairs of another form"
        )
    report.append(f"{place}: {len(source.rows)} rows read, {reasons.total()} dropped{_listed(reasons)}")
    report += [f"{place}: {note}" for note in source.notes]
    report += [f"{NOTE}{place}: {said}" for said in shapes.read_as(source, shape)]
    report += _unused(source, shape, place)
    report += _implicit(records, shape, place) + _doubled(records, place)
    repeats = len(records) - len({_content(record) for record in records})
    if repeats:
        report.append(f"{place}: {repeats} rows repeat an earlier row (kept)")
    return records, dropped, source.size


NOTE = "note: "
"""How a line of the report begins that is said on the console too."""


def _implicit(records: list[PreferenceRecord], shape: Shape, place: Place) -> list[str]:
    num = 0 if shape.prompt else sum(isinstance(record.prompt, str) for record in records)
    if not num:
        return []
    return [f"{NOTE}{place}: no column is the prompt; in {num} rows it is what both sides begin with"]


def note_on_text(data: PreferenceData, config: DataConfig) -> list[str]:
    """For a model that has a chat template: how many pairs are trained without it."""
    num = sum(isinstance(record.prompt, str) for record in (*data.train, *data.held_out))
    if config.as_chat is not None or not num:
        return []
    return [
        f"{NOTE}{num} pairs are plain text, and are trained without the chat template that the model has; "
        "type data.as_chat=true to render them with it, or data.as_chat=false to say that this is meant"
    ]


def _unused(source: Rows, shape: Shape, place: Place) -> list[str]:
    """Columns, and keys of messages, that are not trained on."""
    lines, used = [], shape.columns()
    columns = [str(name) for name in source.columns if name not in used]
    if columns:
        lines.append(f"{NOTE}{place}: columns that are not used: {', '.join(columns)}")
    held = used - {shape.names[part] for part in FOR_TEMPLATES}
    keys = unused_keys((parsed_quietly(row.get(name)) for name in held) for row in source.rows)
    if keys:
        shown = ", ".join(f"{key} ({num} messages)" for key, num in keys.most_common())
        lines.append(f"{NOTE}{place}: keys of messages that are not used: {shown}")
    return lines


def _doubled(records: list[PreferenceRecord], place: Place) -> list[str]:
    """Text prompts that both sides begin with once more, and that are scored there."""
    num = 0
    for record in records:
        if isinstance(record.prompt, str) and (start := record.prompt.strip()):
            num += all(str(side).strip().startswith(start) for side in (record.chosen, record.rejected))
    if not num:
        return []
    return [
        f"{NOTE}{place}: in {num} rows both sides begin with the prompt, which is then there twice and is "
        "scored; leave the column prompt out, or cut it from the sides"
    ]


def _check_parts(config: DataConfig, weighing: Weighing) -> None:
    """Parts that data.columns names: known, and those of a weight also read."""
    for part, name in (config.columns or {}).items():
        if part not in PARTS + FOR_TEMPLATES + WEIGHT_PARTS:
            known = ", ".join(PARTS + FOR_TEMPLATES + WEIGHT_PARTS)
            raise UserError(
                f"data.columns.{part}: no such part; the parts are {known}; "
                "type data.columns='{prompt: NAME, chosen: NAME, rejected: NAME}'"
            )
        if part in WEIGHT_PARTS and part not in weighing.parts:
            kind = "weight" if part == "weight" else "dora"
            raise UserError(
                f"data.columns.{part}={name}: has no effect without {kind}; "
                f"type objective.sample_weight={kind} as well"
            )
    if weighing.parts and config.source == "arithmetic":
        raise UserError(
            f"objective.sample_weight: data=arithmetic has no column {weighing.parts[0]}; "
            "type data=file data.path=PAIRS.jsonl, or objective.sample_weight=null"
        )


def _check_columns(seen: list[str], shape: Shape, place: Place, config: DataConfig) -> None:
    # A prompt column may be absent, and what is for templates, unless the user has named it.
    optional = {"prompt", *FOR_TEMPLATES} - set(config.columns or {})
    if shape.choice is not None:
        optional |= {"chosen", "rejected"}
    names = shape.names
    needed = [part for part in names if part not in optional]
    missing = [names[part] for part in needed if names[part] not in seen]
    if missing:
        parts = ", ".join(f"{part}: NAME" for part in needed if names[part] in missing)
        known = shapes.advice(seen) if {"chosen", "rejected"} & set(missing) and not config.columns else None
        raise place.error(
            f"has no column {' and no column '.join(missing)}, but {', '.join(map(str, seen))}; "
            + (known or f"type data.columns='{{{parts}}}'")
        )


def _read_records(
    source: Rows, shape: Shape, place: Place, config: DataConfig, weighing: Weighing
) -> tuple[list[PreferenceRecord], dict[str, list[int]]]:
    records: list[PreferenceRecord] = []
    dropped: dict[str, list[int]] = {}
    for number, row in zip(source.numbers, source.rows, strict=True):
        try:
            values = shape.values(row)
            if shape.prompt and values["prompt"] is None:
                raise BadRowError("prompt is null")
            sides = (values["prompt"], values["chosen"], values["rejected"])
            record = read_record(*sides, number, *(values[part] for part in FOR_TEMPLATES))
            if config.as_chat:
                record = as_messages(record, bool(shape.prompt))
            records.append(dataclasses.replace(record, weight=weighing.weight(values)))
        except BadRowError as error:
            if config.on_bad_row == "error":
                raise place.error(
                    f"{source.where(number)} cannot train: {error}; mend it or type data.on_bad_row=drop"
                ) from None
            dropped.setdefault(str(error), []).append(number)
    return records, dropped


def _listed(reasons: Counter[str]) -> str:
    """The reasons with their counts, the most frequent first, behind a colon; nothing where there are
    none."""
    counts = ", ".join(f"{num} because {reason}" for reason, num in reasons.most_common())
    return f": {counts}" if counts else ""


def _describe_weights(train: list[PreferenceRecord], weighing: Weighing) -> str:
    """The weights' line for the log; raises UserError where nothing would be trained."""
    weights = [record.weight for record in train]
    if not any(weights):
        raise UserError(
            f"objective.sample_weight: the weight of all {len(train)} training pairs is 0, from column "
            f"{weighing.parts[0]}; mend it or type objective.sample_weight=null"
        )
    return describe_weights(weights)


def _draw_held_out(
    records: list[PreferenceRecord], config: DataConfig, report: list[str]
) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
    """(training pairs, held-out pairs), both in the source's order."""
    if len(records) < 2:
        raise UserError(f"{_named(config)}: has 1 usable pair; give at least 2, one to hold out")
    if len(records) <= config.eval_pairs:
        raise UserError(
            f"data.eval_pairs={config.eval_pairs}: {', '.join(config.train_paths())} has {len(records)} "
            "usable pairs, and at least 1 must be left to train on; type "
            f"data.eval_pairs={max(1, len(records) // 5)}"
        )
    held_out, train = _draw(records, config.eval_pairs, config.seed)
    report.append(
        f"{len(held_out)} held-out pairs drawn from the {len(records)} pairs by data.seed={config.seed}"
    )
    return train, held_out


def _draw(
    records: list[PreferenceRecord], num: int, seed: int
) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
    """`num` records drawn by `seed`, and the rest; both keep their order."""
    drawn = set(random.Random(seed).sample(range(len(records)), num))
    return [records[i] for i in sorted(drawn)], [record for i, record in enumerate(records) if i not in drawn]


def _drop_held_out(
    train: list[PreferenceRecord], held_out: list[PreferenceRecord], report: list[str]
) -> list[PreferenceRecord]:
    """`train` without the pairs that are held out too; those that only share a prompt are counted and
    kept."""
    pairs = {_content(record) for record in held_out}
    kept = [record for record in train if _content(record) not in pairs]
    if len(kept) < len(train):
        report.append(f"{len(train) - len(kept)} training pairs dropped because they are held-out pairs too")
    prompts = {_key([record.prompt]) for record in held_out}
    shared = sum(_key([record.prompt]) in prompts for record in kept)
    if shared:
        report.append(f"{shared} training pairs share their prompt with a held-out pair (kept)")
    return kept


def _content(record: PreferenceRecord) -> str:
    """Equal for pairs that are equal in all but their row number."""
    for_template = (record.tools, record.documents, record.template_kwargs)
    return _key([record.prompt, record.chosen, record.rejected, *for_template])


def _key(parts: Iterable[Any]) -> str:
    return json.dumps(list(parts))
