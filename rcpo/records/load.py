"""From a data config to preference records: training pairs, held-out pairs, and what became of the rows.

Owns the checks on columns and the policy on bad rows. `rcpo.records` reads, `rcpo.records.record` judges
single rows, `rcpo.records.selection` draws. Called by `rcpo.training.read_inputs`; the
same config gives the same records on every rank."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from rcpo.common.errors import UserError
from rcpo.config.schema import DataConfig, MixPart
from rcpo.records import images, shapes
from rcpo.records.account import Account, RowAccount, why
from rcpo.records.arithmetic import arithmetic_records
from rcpo.records.conversations import MESSAGES, read_conversation
from rcpo.records.gold import GOLD, with_gold
from rcpo.records.lists import LISTED, read_list, weights_made
from rcpo.records.messages import parsed_quietly, unused_keys, without_system
from rcpo.records.mixture import drawn
from rcpo.records.places import Place, held_out_place, mixed_place, training_place
from rcpo.records.readers import Rows, read_rows
from rcpo.records.record import BadRowError, PreferenceRecord, as_messages, as_text, read_record
from rcpo.records.scenes import shapes_records
from rcpo.records.selection import NOTE, Judge, SourceRecords, all_usable, content, select
from rcpo.records.shapes import Shape
from rcpo.records.weights import (
    PROBABILITIES,
    UNWEIGHTED,
    WEIGHT_PARTS,
    Weighing,
    describe_weights,
    weighed,
)

PARTS = ("prompt", "chosen", "rejected")
FOR_TEMPLATES = ("tools", "documents", "chat_template_kwargs")
"""Columns that a chat template is handed, where they are there."""
NAMED = (*PARTS, *shapes.SINGLE, *LISTED, MESSAGES)
"""Parts whose names in data.columns say what a row is."""


KNOWN = (*NAMED, *FOR_TEMPLATES, *images.COLUMNS, GOLD, *WEIGHT_PARTS)
"""All parts that data.columns can name."""


@dataclass(frozen=True)
class PreferenceData:
    """Training and held-out pairs; no pair is in both."""

    train: list[PreferenceRecord]
    held_out: list[PreferenceRecord]
    report: list[str]
    """Lines for the log: duplicates, draws, columns that are not used."""
    account: Account
    """What became of every row."""


def load_records(
    config: DataConfig,
    weighing: Weighing = UNWEIGHTED,
    train: Judge = all_usable,
    held_out: Judge = all_usable,
    has_gold: bool = False,
) -> PreferenceData:
    """Read the pairs that `config` names and hold some out.

    Held-out pairs are those of data.eval_path or data.eval_split (at most data.eval_pairs of them, drawn by
    data.seed), else data.eval_pairs pairs drawn by data.seed from the training pairs. A training pair
    identical to a held-out one is dropped. data.train_pairs draws that many of the rest by data.seed, since
    many files are sorted; it never moves the held-out set. Pairs keep their order. Training pairs have
    the weights that `weighing` reads. `train` and `held_out` say which records the model's tokenizer can use:
    pairs are drawn from those. `has_gold`: whether rows have a gold response (`rcpo.records.gold`). Raises
    UserError with one line for bad input.
    """
    _check_parts(config, weighing, has_gold)
    for part in config.mix or ():
        try:
            _check_parts(_as_mixed(part, config), weighing, has_gold)
        except UserError as error:
            raise UserError(f"data.mix: {error}") from None
    if config.source != "file":
        return _load_generated(config, train, held_out)
    report: list[str] = []
    training = _read_training(config, report, weighing, has_gold)
    own = held_out_place(config)
    held_out_source = None if own is None else _read_place(own, config, report, UNWEIGHTED, has_gold)
    selected = select(config, training, held_out_source, train, held_out)
    report += selected.report
    if weighing.parts:
        report.append(_describe_weights(selected.train, weighing, config.lists))
    return PreferenceData(selected.train, selected.held_out, report, selected.account)


def _load_generated(config: DataConfig, train: Judge, held_out: Judge) -> PreferenceData:
    name = config.source
    if config.path is not None:
        raise UserError(f"data.path={config.path}: data={name} reads no file; type data=file")
    if config.columns:
        raise UserError(f"data.columns: data={name} has no columns; type data=file data.path=PAIRS.jsonl")
    if config.train_pairs is None:
        raise UserError(f"data.train_pairs=null: data={name} needs a number; type data.train_pairs=2048")
    if name == "shapes":
        both, model = shapes_records(config.train_pairs, config.eval_pairs, config.seed), "tiny_vision"
    else:
        both = arithmetic_records(config.train_pairs, config.eval_pairs, config.seed, config.responses)
        model = "tiny"
    for records, judge in zip(both, (train, held_out), strict=True):
        for reason in filter(None, judge(records)):
            raise UserError(f"data={name}: {reason}; type model={model}, or data=file data.path=PAIRS.jsonl")
    account = RowAccount(
        name, config.train_pairs + config.eval_pairs, held_out=len(both[1]), trained=len(both[0])
    )
    return PreferenceData(*both, [], Account(account, None, [record.row for record in both[1]]))


def _read_training(
    config: DataConfig, report: list[str], weighing: Weighing, has_gold: bool = False
) -> SourceRecords:
    """Training records of one place, or of a mixture, whose rows are numbered as if its sources lay one
    behind the other."""
    if config.mix is None:
        return _read_place(training_place(config), config, report, weighing, has_gold)
    sources, dropped, read, start = [], dict[str, list[int]](), 0, 0
    for part in config.mix:
        of_part = _as_mixed(part, config)
        try:
            source = _read_place(mixed_place(part, config), of_part, report, weighing, has_gold)
        except UserError as error:
            raise UserError(f"data.mix: {error}") from error.__cause__
        sources.append([dataclasses.replace(record, row=record.row + start) for record in source.records])
        for reason, rows in source.account.dropped.items():
            dropped.setdefault(reason, []).extend(row + start for row in rows)
        start += source.size
        read += source.account.read
    records = drawn(config.mix, sources, config.seed, report, NOTE)
    undrawn = sum(map(len, sources)) - len(records)
    return SourceRecords("data.mix", records, RowAccount("data.mix", read, dropped, undrawn=undrawn), start)


def _as_mixed(part: MixPart, config: DataConfig) -> DataConfig:
    """The config with the columns of a source of data.mix."""
    return dataclasses.replace(config, columns=part.columns or config.columns)


def _read_place(
    place: Place, config: DataConfig, report: list[str], weighing: Weighing, has_gold: bool = False
) -> SourceRecords:
    """Records of one source, and the account of its rows; bad rows stop or are dropped as data.on_bad_row
    says."""
    weighed = dict.fromkeys((*weighing.parts, *weighing.list_parts))
    parts = (*PARTS, *FOR_TEMPLATES, *images.COLUMNS, *weighed, *((GOLD,) if has_gold else ()))
    names = {part: (config.columns or {}).get(part, part) for part in parts}
    is_named = any(part in NAMED for part in config.columns or {})
    for kind in (shapes.SINGLE, LISTED, (MESSAGES,)):
        if any(part in kind for part in config.columns or {}):
            names |= {part: (config.columns or {}).get(part, part) for part in kind}
    source = read_rows(place, set(names.values()) | (set() if is_named else shapes.COLUMNS))
    names = shapes.with_one_order(names, source.columns, config.columns or {})
    names = shapes.without_absent_label(names, source.columns, config.columns or {})
    shape = (
        shapes.own_shape(source, names)
        if is_named
        else shapes.shape_of(source, names, config.as_chat is False)
    )
    unread = weighed.keys() - set(weighing.list_parts if shape.is_list else weighing.parts)
    own_names = {part: name for part, name in shape.names.items() if part not in unread}
    shape = dataclasses.replace(shape, names=own_names)
    _check_columns(source.columns, shape, place, config)
    records, dropped = _read_records(source, shape, place, config, weighing)
    records, num_folded = _without_system(records, config.system)
    if num_folded:
        done = {"merge": "stands before the user's text", "drop": "is left out"}[config.system]
        report.append(f"{NOTE}{place}: the system turn of {num_folded} rows {done} (data.system)")
    account = RowAccount(str(place), len(source.rows), dropped)
    if not records:
        reasons = why(dropped) if len(dropped) > 1 else "".join(f" ({reason})" for reason in dropped)
        raise place.error(
            f"none of its {len(source.rows)} rows can train{reasons}; give pairs of another form"
        )
    report += [f"{place}: {note}" for note in source.notes]
    report += [f"{NOTE}{place}: {said}" for said in shapes.read_as(source, shape)]
    report += _unused(source, shape, place)
    report += _implicit(records, shape, place) + _doubled(records, place)
    repeats = len(records) - len({content(record) for record in records})
    if repeats:
        report.append(f"{place}: {repeats} rows repeat an earlier row (kept)")
    return SourceRecords(f"{place.path_key}={place.shown}", records, account, source.size)


def _without_system(records: list[PreferenceRecord], how: str) -> tuple[list[PreferenceRecord], int]:
    """The records as data.system wants their system turns, and how many have changed."""
    changed = [
        dataclasses.replace(record, prompt=without_system(record.prompt, how))
        if isinstance(record.prompt, list)
        else record
        for record in records
    ]
    return changed, sum(new != old for new, old in zip(changed, records, strict=True))


def records_at(config: DataConfig, rows: Sequence[int]) -> list[PreferenceRecord]:
    """The held-out records of these rows, as a run has noted them. Raises UserError, and KeyError where there
    is no such row any more."""
    own = held_out_place(config)
    source = (
        _read_training(config, [], UNWEIGHTED) if own is None else _read_place(own, config, [], UNWEIGHTED)
    )
    by_row = {record.row: record for record in source.records}
    return [by_row[row] for row in rows]


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
    held = used - {shape.names[part] for part in (*FOR_TEMPLATES, *images.COLUMNS)}
    keys = unused_keys((parsed_quietly(row.get(name)) for name in held) for row in source.rows)
    if keys:
        shown = ", ".join(f"{key} ({num} messages)" for key, num in keys.most_common())
        lines.append(f"{NOTE}{place}: keys of messages that are not used: {shown}")
    return lines


def _doubled(records: list[PreferenceRecord], place: Place) -> list[str]:
    """Prompts of text, or of one user turn, that both sides begin with once more, and that are scored
    there."""
    num, is_text = 0, False
    for record in records:
        is_turn = isinstance(record.prompt, list) and len(record.prompt) == 1
        is_text |= not is_turn
        if isinstance(record.prompt, str) or is_turn:
            start, *sides = (as_text(part) for part in (record.prompt, record.chosen, record.rejected))
            num += bool(start) and all(side.startswith(start) for side in sides)
    if not num:
        return []
    return [
        f"{NOTE}{place}: in {num} rows both sides begin with the prompt, which is then there twice and is "
        f"scored; {'leave the column prompt out, or ' if is_text else ''}cut it from the sides"
    ]


def _check_parts(config: DataConfig, weighing: Weighing, has_gold: bool = False) -> None:
    """Parts that data.columns names: known, and those of a weight also read."""
    for part, name in (config.columns or {}).items():
        if part not in KNOWN:
            known = ", ".join(KNOWN)
            raise UserError(
                f"data.columns.{part}: no such part; the parts are {known}; "
                "type data.columns='{prompt: NAME, chosen: NAME, rejected: NAME}'"
            )
        if part in WEIGHT_PARTS and part not in (*weighing.parts, *weighing.list_parts):
            kind = {"weight": "weight", "probability": "dora"}.get(part, "dora_mean")
            raise UserError(
                f"data.columns.{part}={name}: has no effect without {kind}; "
                f"type objective.sample_weight={kind} as well"
            )
    if has_gold and config.source != "file":
        raise UserError(
            f"objective.sft_of=gold: data={config.source} has no gold response; type data=file "
            "data.path=PAIRS.jsonl, or objective.sft_of=response"
        )
    if weighing.parts and config.source != "file":
        raise UserError(
            f"objective.sample_weight: data={config.source} has no column {weighing.parts[0]}; "
            "type data=file data.path=PAIRS.jsonl, or objective.sample_weight=null"
        )


def _check_columns(seen: list[str], shape: Shape, place: Place, config: DataConfig) -> None:
    # A prompt column may be absent, and what is for templates, unless the user has named it.
    optional = {"prompt", *FOR_TEMPLATES, *images.COLUMNS} - set(config.columns or {})
    if shape.is_single:
        optional -= {"prompt"}
    if shape.choice is not None or shape.is_single or shape.is_list or shape.is_conversation:
        optional |= {"chosen", "rejected"}
    names = shape.names
    needed = [part for part in names if part not in optional]
    missing = [names[part] for part in needed if names[part] not in seen]
    if missing:
        parts = ", ".join(f"{part}: NAME" for part in needed if names[part] in missing)
        other = ", or objective.sft_of=response" if names.get(GOLD) in missing else ""
        known = shapes.advice(seen) if {"chosen", "rejected"} & set(missing) and not config.columns else None
        raise place.error(
            f"has no column {' and no column '.join(missing)}, but {', '.join(map(str, seen))}; "
            + (known or f"type data.columns='{{{parts}}}'{other}")
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
            tools, documents, kwargs = (values[part] for part in FOR_TEMPLATES)
            if shape.is_list:
                responses, scores, ranks = (values.get(part) for part in LISTED)
                listed = (values["prompt"], responses, scores, ranks, number, tools, documents, kwargs)
                record = read_list(*listed, values.get(PROBABILITIES), weighing.weigh_list)
            elif shape.is_conversation:
                record = read_conversation(values[MESSAGES], number, tools, documents, kwargs)
            else:
                sides = (values["prompt"], values["chosen"], values["rejected"])
                label = values["label"] if shape.is_single else None
                record = read_record(*sides, number, tools, documents, kwargs, label)
            if config.as_chat:
                record = as_messages(record, bool(shape.prompt))
            if GOLD in values:
                record = with_gold(record, values["prompt"], values[GOLD])
            folder = functools.partial(source.folder_of, number)
            record = images.with_images(record, values, folder, config.image_megapixels)
            if record.of_responses is None:
                record = weighed(record, weighing, values)
            records.append(record)
        except BadRowError as error:
            if config.on_bad_row == "error":
                raise place.error(
                    f"{source.where(number)} cannot train: {error}; mend it or type data.on_bad_row=drop"
                ) from None
            dropped.setdefault(str(error), []).append(number)
    return records, dropped


def _describe_weights(train: list[PreferenceRecord], weighing: Weighing, lists: str) -> str:
    """The weights' line for the log; raises UserError where nothing would be trained."""
    weights = [weight for record in train for weight in weights_made(record, lists)]
    if not any(weights):
        raise UserError(
            f"objective.sample_weight: the weight of all {len(train)} training pairs is 0, from column "
            f"{weighing.parts[0]}; mend it or type objective.sample_weight=null"
        )
    return describe_weights(weights)
