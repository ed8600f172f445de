"""What a config would train on: the account of its rows, lengths, and pairs as the model sees them.

Owns what `rcpo data` says, by the functions that a run reads its data with; `rcpo.quality.preview_text`
prints it. Needs the model's tokenizer and config.json, and no weights.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.describe import answers_marked, decoded
from rcpo.data.inputs import Inputs
from rcpo.data.pairs import TokenizedPair, TokenizedSide
from rcpo.data.tokenize import tokenize_records
from rcpo.models.checks import check_vocabulary
from rcpo.models.load import load_tokenizer
from rcpo.records.held_out_split import with_held_out_split
from rcpo.records.images import Image
from rcpo.records.load import NOTE
from rcpo.records.record import PreferenceRecord
from rcpo.training.read_inputs import PairsRead, check_sizes, filtered_inputs, tokenise

PARTS = ("prompt", "chosen", "rejected")
NUM_BINS = 10
UNCUT = 10**8
"""Tokens of a side, as train.max_length has it at most."""


@dataclass(frozen=True)
class ShownPart:
    """A prompt or a response, decoded."""

    text: str
    """Special tokens in ⟦ ⟧."""
    tokens: int
    cut: int
    """Tokens that train.max_length or train.max_prompt_length has cut off: in front of a prompt, behind a
    response."""


@dataclass(frozen=True)
class ShownImage:
    """An image of a prompt, as its file has it."""

    name: str
    """Of its file; its place among the row's images, where the row has its bytes."""
    width: int
    height: int
    tokens: int
    """What stands for it in the prompt."""
    image: Image = dataclasses.field(repr=False)

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "width": self.width, "height": self.height, "tokens": self.tokens}


@dataclass(frozen=True)
class ShownPair:
    row: int
    use: str
    """trained, or held out."""
    prompt: ShownPart
    chosen: ShownPart | None
    """Scored, as is `rejected`; None where a single answer, or a conversation, has no such response."""
    rejected: ShownPart | None
    images: list[ShownImage] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Preview:
    """What `rcpo data` says of a config."""

    inputs: Inputs
    notes: list[str]
    """What the console of a run says, beside the account."""
    cuts: dict[str, int]
    """Training pairs, before data.filter, with a cut prompt, chosen or rejected response."""
    pairs: list[ShownPair]
    refused: str | None
    """Why `rcpo train` would refuse to begin."""

    def lengths(self) -> dict[str, list[int]]:
        """Tokens of each part of the training pairs that there is."""
        arrays, responses = self.inputs.train.arrays, self.inputs.train.num_scored
        columns = (arrays.num_prompt.max(axis=1), responses[:, 0], responses[:, 1])
        found = {part: column[column > 0].tolist() for part, column in zip(PARTS, columns, strict=True)}
        return {part: values for part, values in found.items() if values}

    def edges(self) -> list[int]:
        """Ends of the histograms' bins, in tokens: of one width, the same for all parts."""
        longest = max(map(max, self.lengths().values()))
        width = -(-(longest + 1) // NUM_BINS)
        return [number * width for number in range(NUM_BINS + 1)]

    def histograms(self) -> dict[str, list[int]]:
        """Training pairs of each bin."""
        return {
            part: np.histogram(values, self.edges())[0].tolist() for part, values in self.lengths().items()
        }

    def as_json(self) -> dict[str, Any]:
        edges, histograms = self.edges(), self.histograms()
        return {
            "refused": self.refused,
            "rows": self.inputs.account.as_json(),
            "notes": self.notes,
            "lengths": {
                part: {
                    "mean": float(np.mean(values)),
                    "median": float(np.median(values)),
                    "longest": max(values),
                    "cut": self.cuts[part],
                    "histogram": {"edges": edges, "pairs": histograms[part]},
                }
                for part, values in self.lengths().items()
            },
            "pairs": [
                {"row": pair.row, "use": pair.use}
                | {part: vars(shown) for part in PARTS if (shown := getattr(pair, part)) is not None}
                | ({"images": [image.as_json() for image in pair.images]} if pair.images else {})
                for pair in self.pairs
            ],
        }


def preview_of(config: ResolvedConfig, num_pairs: int, rows: Sequence[int]) -> Preview:
    """Read the data as a run does. Shows the first `num_pairs` training pairs, and those of `rows`, which
    may be held out. Raises UserError where no pair is left, or a row is not used, with the reason."""
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(config.model, tokenizer)
    data, split_notes = with_held_out_split(config.data)
    config = dataclasses.replace(config, data=data)
    read = tokenise(config, tokenizer)
    read.records.report.extend(split_notes)
    inputs = filtered_inputs(config, tokenizer, read.tokens)
    try:
        check_sizes(config, read.tokens, inputs.num_train)
        refused = None
    except UserError as error:
        refused = str(error)
    first = inputs.train[:: inputs.train.slots]  # of a list its best and its worst response
    wanted = [(pair, "trained") for pair in first[:num_pairs]]
    wanted += [_pair_of_row(row, inputs) for row in rows]
    notes = [line for line in inputs.report if line.startswith(("data.filter", NOTE))]
    shown = _shown(wanted, read, config)
    return Preview(inputs, notes, read.train.cuts, shown, refused)


def _pair_of_row(row: int, inputs: Inputs) -> tuple[TokenizedPair, str]:
    """A pair and its use, by its row in the training source. Raises UserError where the row is not used."""
    account = inputs.account
    places = np.flatnonzero(inputs.train.arrays.rows == row)
    if len(places):
        return inputs.train[int(places[0])], "trained"
    if account.held_out is None:
        for pair in inputs.held_out:
            if pair.row == row:
                return pair, "held out"
    place = account.training
    for reason, lost in place.dropped.items():
        if row in lost:
            raise UserError(f"--row {row}: is dropped because {reason}; give a row that is used")
    raise UserError(
        f"--row {row}: no pair of {place.place} that is used has this number (counted from 0, of "
        f"{place.read} rows); give another"
    )


def _shown(
    wanted: Sequence[tuple[TokenizedPair, str]], read: PairsRead, config: ResolvedConfig
) -> list[ShownPair]:
    """The pairs decoded; what is cut from them shows beside the same records without limits."""
    records = {"trained": _by_row(read.records.train), "held out": _by_row(read.records.held_out)}
    originals = [records[use][pair.row] for pair, use in wanted]
    written = (config.model.chat_template_kwargs, config.data.append_eos)
    return [
        _shown_pair(pair, _whole(record, read.tokenizer, *written), use, read.tokenizer)
        for (pair, use), record in zip(wanted, originals, strict=True)
    ]


def _whole(
    record: PreferenceRecord,
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any],
    append_eos: bool,
) -> list[TokenizedSide]:
    """All responses of a record without limits."""
    pairs = tokenize_records([record], tokenizer, UNCUT, UNCUT, "error", kwargs, append_eos, "whole").pairs
    return [side for pair in pairs for side in pair.sides]


def _by_row(records: Sequence[PreferenceRecord]) -> dict[int, PreferenceRecord]:
    return {record.row: record for record in records}


def _shown_pair(
    pair: TokenizedPair, whole: Sequence[TokenizedSide], use: str, tokenizer: PreTrainedTokenizerBase
) -> ShownPair:
    prompt = pair.prompt_ids
    cut = whole[0].num_prompt - len(prompt)
    responses = [
        _shown_response(side, _uncut(side, whole), tokenizer) if side.num_tokens else None
        for side in (pair.chosen, pair.rejected)
    ]
    shown = ShownPart(decoded(prompt, tokenizer), len(prompt), cut)
    chosen, rejected = responses
    return ShownPair(pair.row, use, shown, chosen, rejected, _shown_images(pair, tokenizer))


def _shown_images(pair: TokenizedPair, tokenizer: PreTrainedTokenizerBase) -> list[ShownImage]:
    if pair.pictures is None:
        return []
    found = []
    for number, (image, text) in enumerate(zip(pair.pictures.images, pair.pictures.written, strict=True), 1):
        name = f"image {number}" if image.path is None else image.path.name
        num_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        found.append(ShownImage(name, *image.open().size, num_tokens, image))
    return found


def _uncut(side: TokenizedSide, whole: Sequence[TokenizedSide]) -> TokenizedSide:
    """The side that this one is cut from, on whichever side data.flip has put it."""
    response = side.input_ids[side.num_prompt :]
    starts_so = (each for each in whole if each.input_ids[each.num_prompt :][: len(response)] == response)
    return next(starts_so, side)


def _shown_response(
    side: TokenizedSide, whole: TokenizedSide, tokenizer: PreTrainedTokenizerBase
) -> ShownPart:
    response = side.input_ids[side.num_prompt :]
    num_whole = whole.num_tokens - whole.num_prompt
    text = decoded(response, tokenizer) if side.scored is None else answers_marked(side, tokenizer)[1:-1]
    return ShownPart(text, side.num_scored, num_whole - len(response))
