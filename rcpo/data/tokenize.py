"""From preference records to token ids: chat template, prompt/response split, truncation budget, counts.

Owns the one policy on BOS and EOS: tokens are what inference will see. Does not read data
(`rcpo.records.load`), say where a response begins (`rcpo.data.render`) or pad (`rcpo.data.batch`). Called by
`rcpo.training.read_inputs`.

How a side becomes ids: the whole conversation is rendered and tokenised once, since a tokenizer may merge
characters across the end of the prompt, and ids of separately tokenised parts are then not what the model
sees. The first response token is the first one that holds a character of the response, found by character
offset. A token that spans the boundary thus belongs to the response: it is the one that predicts response
text. Tokenizers without offsets (not "fast") take the common beginning of prompt ids and whole ids instead,
which is the same but for odd tokenizers.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.data.conversation import fitted, is_conversation, render_conversation, scored_tokens
from rcpo.data.describe import describe_lengths
from rcpo.data.generation import special_ids, tokens_in_front
from rcpo.data.lists import listed, num_ties, pairs_of_list, weighed_by_row
from rcpo.data.packer import Packer
from rcpo.data.pairs import NO_SIDE, PackedPairs, TokenizedPair, TokenizedSide
from rcpo.data.pictures import sight_of
from rcpo.data.render import (
    LostPartError,
    Rendered,
    ignores,
    render_messages,
    render_text,
    takes_merged,
    unwritten,
)
from rcpo.data.template import Template, look_at_template, num_common
from rcpo.records.record import BadRowError, PreferenceRecord

__all__ = [
    "Tokeniser",
    "TokenizedData",
    "TokenizedPair",
    "TokenizedSide",
    "tokenize_records",
]

_RECORDS_PER_BATCH = 512
_WRITTEN_BY_TEMPLATES = ("tools", "documents")
"""Parts of a record that a chat template may write."""
_MOST_SHOWN = 80
"""Characters of a response that are shown where a template leaves them out."""


@dataclass(frozen=True)
class TokenizedData:
    """Pairs that can train, in the order of their rows, and lines for the log: what was cut, and how long the
    pairs are."""

    pairs: PackedPairs
    report: list[str]
    dropped: dict[str, list[int]]
    """Rows that cannot train, by reason."""
    cuts: dict[str, int]
    """Pairs with a cut prompt, chosen or rejected response."""
    notes: dict[str, str] = field(default_factory=dict)
    """What a user should know of the tokens: lines by what they are about, so that each is said once."""


class Tokeniser:
    """Tokenise both sides of every record under one policy.

    Messages: rendered whole with the chat template, which is given `template_kwargs` and the row's own, and
    split where the prompt with its generation prompt ends, so that a default system prompt never leaks into a
    response. The response ends with the token that ends generation; template text behind it is cut. Plain
    text: prompt and response as they are, one after the other, also where the tokenizer has a chat template
    (as TRL does). In front stands what inference writes there: of messages what the template writes, of plain
    text what the tokenizer writes when it is called on it, and never a BOS twice. EOS: exactly once at the
    end where the tokenizer has one and the template has not closed the turn with a token of its own; without
    `append_eos` neither of these. A BOS or EOS that the tokenizer lacks never enters the ids.
    Truncation, in tokens: a prompt longer than `max_prompt_length` is cut from the left, but keeps BOS; with
    None it may take what the pair's longer response leaves of `max_length`, at least half. Both sides keep
    one prompt. Each response is then cut from the right to what is left of `max_length` (EOS is cut too), and
    is never empty. Raises UserError where records are messages and the tokenizer has no chat template, and
    with `on_bad_row` "error" for the first row that cannot train (a template's refusal, sides that the
    tokenizer or the cut made identical). All responses of a list share one prompt likewise; `lists` says what
    becomes of it (data.lists)."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        max_prompt_length: int | None,
        on_bad_row: str,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        append_eos: bool = True,
        lists: str = "best_worst",
    ) -> None:
        self._work = _Work(tokenizer, max_length, max_prompt_length, template_kwargs, append_eos, lists)
        self._on_bad_row, self._lists = on_bad_row, lists
        self._packer = Packer()
        self._num_pairs = 0
        self._places: dict[int, range] = {}
        """Where the pairs of each record are among those that are packed, by the record's id."""
        self._kept: list[PreferenceRecord] = []
        self._dropped: dict[str, list[int]] = {}

    def __call__(self, records: Sequence[PreferenceRecord]) -> list[str | None]:
        """Tokenise these, too; for each None, or the reason why it cannot train."""
        reasons: list[str | None] = []
        for start in range(0, len(records), _RECORDS_PER_BATCH):
            batch = records[start : start + _RECORDS_PER_BATCH]
            outcomes = self._work.tokenize_batch(batch)
            for record, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, list):
                    self._kept.append(record)
                    self._places[id(record)] = range(self._num_pairs, self._num_pairs + len(outcome))
                    self._num_pairs += len(outcome)
                    reasons.append(None)
                    continue
                if self._on_bad_row == "error":
                    lost = (
                        f" (it leaves out {_start_of(outcome)})" if isinstance(outcome, LostPartError) else ""
                    )
                    raise UserError(
                        f"data: row {record.row} (counted from 0) cannot train: {outcome}{lost}; "
                        "mend it or type data.on_bad_row=drop"
                    )
                reasons.append(str(outcome))
                self._dropped.setdefault(str(outcome), []).append(record.row)
            self._packer.add([pair for outcome in outcomes if isinstance(outcome, list) for pair in outcome])
        return reasons

    def data(self, records: Sequence[PreferenceRecord]) -> TokenizedData:
        """The pairs of `records`, in their order: of those that could be used."""
        packed = self._packer.packed()
        places = [self._places[id(record)] for record in records]
        order = [place for of_record in places for place in of_record]
        if self._lists == "whole" and any(record.scores for record in records):
            packed = listed(packed, places)
        elif order != list(range(self._num_pairs)):  # drawn in several goes, or some of them were given back
            packed = packed.take(order)
        if self._lists == "all_pairs":
            packed = weighed_by_row(packed, [len(of_record) for of_record in places])
        report = [*self._work.report(), *describe_lengths(packed)]
        return TokenizedData(packed, report, self._dropped, self._work.cuts(), self._work.notes())


def tokenize_records(
    records: Sequence[PreferenceRecord],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int | None,
    on_bad_row: str,
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    append_eos: bool = True,
    lists: str = "best_worst",
) -> TokenizedData:
    """`Tokeniser` over these records; those that cannot train are left out and counted."""
    tokenise = Tokeniser(
        tokenizer, max_length, max_prompt_length, on_bad_row, template_kwargs, append_eos, lists
    )
    reasons = tokenise(records)
    return tokenise.data([record for record, reason in zip(records, reasons, strict=True) if reason is None])


class _Work:
    """One pass over records: the tokenizer, the limits and the running counts."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        max_prompt_length: int | None,
        template_kwargs: Mapping[str, Any],
        append_eos: bool,
        lists: str,
    ) -> None:
        self._tokenizer, self._append_eos, self._lists = tokenizer, append_eos, lists
        self._max_length, self._max_prompt_length = max_length, max_prompt_length
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._special, self._in_front = special_ids(tokenizer), tokens_in_front(tokenizer)
        self._template_kwargs = template_kwargs
        self._templates: dict[str, Template] = {}
        self._ignores: dict[tuple[str, str], bool] = {}
        self._merging_helps: dict[str, bool] = {}
        self._sight = sight_of(tokenizer)
        self._counts = Counter[str]()
        self._unused = Counter[str]()
        self._notes: dict[str, str] = {}

    def tokenize_batch(self, records: Sequence[PreferenceRecord]) -> list[list[TokenizedPair] | BadRowError]:
        """For each record its pair, or what becomes of its list; else the reason why it has none."""
        outcomes: list[list[TokenizedPair] | BadRowError] = []
        rendered = [self._look(record, self._render(record)) for record in records]
        encoded = iter(self._encode([whole for whole in rendered if isinstance(whole, Rendered)]))
        for record, whole in zip(records, rendered, strict=True):
            if isinstance(whole, BadRowError):
                outcomes.append(whole)
                if isinstance(whole, LostPartError):
                    said = f"row {record.row} (counted from 0), for one: {whole}; it leaves out "
                    self._notes.setdefault(str(whole), said + _start_of(whole))
                continue
            sides = [next(encoded) for _ in whole.texts]
            try:
                outcomes.append(self._make_pairs(sides, whole, record))
            except BadRowError as error:
                outcomes.append(error)
        return outcomes

    def cuts(self) -> dict[str, int]:
        return {part: self._counts[part] for part in ("prompt", "chosen", "rejected")}

    def report(self) -> list[str]:
        """What was cut or out of the ordinary; nothing where nothing was."""
        num, lines = self._counts, []
        if num["prompt"]:
            what = (
                f"train.max_length={self._max_length}"
                if self._max_prompt_length is None
                else f"train.max_prompt_length={self._max_prompt_length}"
            )
            lines.append(f"{num['prompt']} prompts cut from the left ({what})")
        if num["chosen"] or num["rejected"]:
            lines.append(
                f"{num['chosen']} chosen and {num['rejected']} rejected responses cut from the right "
                f"(train.max_length={self._max_length})"
            )
        if num["ties"]:
            lines.append(
                f"{num['ties']} times two responses of a list are scored alike: they are not compared"
            )
        if num["spanning"]:
            lines.append(f"{num['spanning']} sides have a token that spans prompt and response (scored)")
        return lines

    def notes(self) -> dict[str, str]:
        """What of the records is not trained on, and where the tokens are not what a user may expect."""
        return self._notes | {what: f"{num} rows have {what}" for what, num in self._unused.items()}

    def _count_unused(self, record: PreferenceRecord, key: str, kwargs: Mapping[str, Any]) -> None:
        """Count tools and documents that the template does not write; whether it does, the first row with
        them says."""
        for part in _WRITTEN_BY_TEMPLATES:
            if not getattr(record, part):
                continue
            if isinstance(record.prompt, str):
                self._unused[f"{part}, for which plain text has no place"] += 1
                continue
            if (key, part) not in self._ignores:
                self._ignores[key, part] = ignores(self._tokenizer, record, kwargs, part)
            if self._ignores[key, part]:
                self._unused[f"{part}, which the chat template does not write"] += 1

    def _render(self, record: PreferenceRecord) -> Rendered | BadRowError:
        if isinstance(record.prompt, str):
            self._count_unused(record, "", {})
            return render_text(record)
        if self._tokenizer.chat_template is None:
            raise UserError(
                "model.chat_template=null: the data are messages and the tokenizer has no chat template; "
                "type model.chat_template=plain"
            )
        kwargs = {**self._template_kwargs, **(record.template_kwargs or {})}
        key = json.dumps(kwargs, sort_keys=True, default=str)
        if key not in self._templates:
            self._templates[key] = look_at_template(self._tokenizer, kwargs)
        template = self._templates[key]
        self._notes.update(dict(zip(template.notes, template.notes, strict=True)))
        render: Callable[..., Rendered]
        render = render_conversation if is_conversation(record) else render_messages
        try:
            rendered = render(self._tokenizer, template, record, kwargs)
        except BadRowError as error:
            return self._with_cure(error, template, record, kwargs)
        self._count_unused(record, key, kwargs)
        for part in unwritten(record.prompt, rendered.texts[0][: rendered.split]):
            self._unused[f"{part}, which the chat template does not write"] += 1
        return rendered

    def _look(self, record: PreferenceRecord, whole: Rendered | BadRowError) -> Rendered | BadRowError:
        """With room for the tokens of the row's images."""
        if record.images and self._sight is None:
            raise UserError(
                f"data: row {record.row} (counted from 0) has an image, and the model reads text alone; give "
                "a vision-language model, or data without images"
            )
        if self._sight is None or isinstance(whole, BadRowError):
            return whole
        try:
            return self._sight.expand(whole, record.images)
        except BadRowError as error:
            return error

    def _with_cure(
        self, error: BadRowError, template: Template, record: PreferenceRecord, kwargs: Mapping[str, Any]
    ) -> BadRowError:
        """The error, which names the system turn where that is why; then what helps is noted too. The first
        row of a reason is tried."""
        if record.prompt[0]["role"] != "system":  # type: ignore[index]
            return error
        reason = str(error)
        if reason not in self._merging_helps:
            self._merging_helps[reason] = takes_merged(self._tokenizer, template, record, kwargs)
        if not self._merging_helps[reason]:
            return error
        self._notes["system"] = (
            "data.system=merge puts system turns into the user's, and the chat template takes such rows then"
        )
        return error if "system" in reason.lower() else BadRowError(f"{reason}, as it has a system turn")

    def _encode(self, rendered: list[Rendered]) -> list[TokenizedSide]:
        """Whole texts as ids with the index of the first response token: a record's sides one by one."""
        if not rendered:
            return []
        texts = [text for item in rendered for text in item.texts]
        splits = [item.split for item in rendered for _ in item.texts]
        # verbose=False: rows longer than the model's limit are cut below, so a warning would mislead.
        batch = self._tokenizer(texts, add_special_tokens=False, verbose=False)
        all_ids = batch["input_ids"]
        if self._tokenizer.is_fast:
            firsts = [
                self._first_by_offset(batch, idx, len(text), splits[idx]) for idx, text in enumerate(texts)
            ]
        else:
            prompts = [text[:split] for text, split in zip(texts, splits, strict=True)]
            prompt_ids = self._tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
            firsts = [num_common(*both) for both in zip(prompt_ids, all_ids, strict=True)]
        spans = [item.spans for item in rendered for _ in item.texts]
        return [
            TokenizedSide(ids, firsts[idx], scored_tokens(batch, idx, firsts[idx], spans[idx], self._special))
            for idx, ids in enumerate(all_ids)
        ]

    def _first_by_offset(self, batch: BatchEncoding, idx: int, num_chars: int, split: int) -> int:
        """Index of the first token with a character at or behind `split`; the number of tokens if there is
        none."""
        for char in range(split, num_chars):
            token = batch.char_to_token(idx, char)
            if token is None:  # white space that the tokenizer drops
                continue
            if batch.token_to_chars(idx, token).start >= split:
                return int(token)
            if batch["input_ids"][idx][token] in self._special:  # a marker that swallows white space
                continue
            self._counts["spanning"] += 1
            return int(token)
        return len(batch["input_ids"][idx])

    def _make_pairs(
        self, encoded: Sequence[TokenizedSide], rendered: Rendered, record: PreferenceRecord
    ) -> list[TokenizedPair]:
        # All sides share one prompt: where a merge across its end makes their ids differ, the shortest one.
        first = encoded[0].input_ids
        num_prompt = min(
            [side.num_prompt for side in encoded]
            + [num_common(first, side.input_ids) for side in encoded[1:]],
        )
        sides = [self._close(side, num_prompt, rendered) for side in encoded]
        if record.label is not None:
            return [self._make_single(sides[0], record)]
        what = "two responses" if record.scores else "the sides"
        num = len(record.responses)  # a gold response behind them may be the chosen one
        if _has_equal(sides[:num]):
            raise BadRowError(f"{what} are identical once tokenised")
        if record.images and record.scores:
            raise BadRowError("a list of responses with an image; rcpo trains pairs with images alone so far")
        cut = self._cut(sides)
        if rendered.pictures is not None and cut[0].num_prompt < sides[0].num_prompt:
            raise BadRowError(self._too_long())
        if _has_equal(cut[:num]):
            raise BadRowError(f"{what} are identical once cut to train.max_length={self._max_length}")
        for number, (before, after) in enumerate(zip(sides[:num], cut, strict=False)):
            name = "rejected" if number else "chosen"
            self._counts[name] += _num_response(after) < _num_response(before)
        self._counts["prompt"] += cut[0].num_prompt < sides[0].num_prompt
        if not record.scores:
            gold = None if record.gold is None else cut[-1]
            pictures = rendered.pictures
            of = record.of_responses
            spread = None if of is None else of.spread((0, 1))
            return [TokenizedPair(cut[0], cut[1], record.row, record.weight, None, pictures, gold, spread)]
        if self._lists != "best_worst":
            self._counts["ties"] += num_ties(record.scores)
        return pairs_of_list(cut, record, self._lists)

    def _too_long(self) -> str:
        """Why a prompt with images is not cut: what would go is an image's tokens, or the words about it."""
        limit, key = self._max_length, "max_length"
        if self._max_prompt_length is not None:
            limit, key = self._max_prompt_length, "max_prompt_length"
        return f"the prompt with its images does not fit into train.{key}={limit}, and is not cut"

    def _make_single(self, side: TokenizedSide, record: PreferenceRecord) -> TokenizedPair:
        """A single answer: the side that its label says, and none."""
        if record.images:
            raise BadRowError("a single answer with an image; rcpo trains pairs with images alone so far")
        cut = self._cut([side])[0]
        self._counts["chosen" if record.label else "rejected"] += _num_response(cut) < _num_response(side)
        self._counts["prompt"] += cut.num_prompt < side.num_prompt
        both = (cut, NO_SIDE) if record.label else (NO_SIDE, cut)
        return TokenizedPair(*both, record.row, record.weight)

    def _close(self, side: TokenizedSide, num_prompt: int, rendered: Rendered) -> TokenizedSide:
        """What inference writes in front, one end token behind."""
        prompt, response = side.input_ids[:num_prompt], side.input_ids[num_prompt:]
        if not rendered.is_chat and prompt[: len(self._in_front)] != self._in_front:
            prompt = [*self._in_front, *prompt]
        while self._bos is not None and prompt[:2] == [self._bos] * 2:
            prompt = prompt[1:]
        if not rendered.is_closed and self._eos is not None and self._append_eos:
            response = [*response, self._eos]
        while len(response) > 1 and response[-1] == response[-2] and response[-1] in self._special:
            response = response[:-1]
        while not self._append_eos and response and response[-1] in self._special:
            response = response[:-1]
        if not prompt:
            raise BadRowError(
                "no token is left of the prompt, and nothing is written in front of it; give a longer prompt"
            )
        if self._bos is not None and prompt[0] != self._bos:
            self._note_bos(rendered.is_chat)
        if not response:
            raise BadRowError("no token is left of a response")
        return TokenizedSide(prompt + response, len(prompt), fitted(side.scored, len(response)))

    def _note_bos(self, is_chat: bool) -> None:
        token = self._tokenizer.convert_ids_to_tokens(self._bos)
        writer, place = ("the chat template", "the template") if is_chat else ("the tokenizer", "the prompts")
        self._notes[f"BOS {is_chat}"] = (
            f"{writer} writes no {token} in front, so that inference does not see it either; if the model "
            f"was trained with it, begin {place} with it"
        )

    def _cut(self, sides: Sequence[TokenizedSide]) -> list[TokenizedSide]:
        """The sides within the limits; the prompt is cut from the left, each response from the right."""
        limit = self._max_prompt_length
        if limit is None:
            longest = max(map(_num_response, sides))
            limit = self._max_length - min(longest, self._max_length // 2)
        return [self._cut_side(side, limit) for side in sides]

    def _cut_side(self, side: TokenizedSide, prompt_limit: int) -> TokenizedSide:
        prompt, response = side.input_ids[: side.num_prompt], side.input_ids[side.num_prompt :]
        limit = min(prompt_limit, self._max_length - 1)
        if len(prompt) > limit:
            first = self._first_tokens(prompt)
            prompt = (first + prompt[len(prompt) - limit + len(first) :])[:limit]
        response = response[: self._max_length - len(prompt)]
        scored = fitted(side.scored, len(response))
        if scored is not None:  # behind the last answer nothing is read
            response = response[: int(scored.nonzero()[0][-1]) + 1]
            scored = fitted(scored, len(response))
        return TokenizedSide(prompt + response, len(prompt), scored)

    def _first_tokens(self, prompt: list[int]) -> list[int]:
        """Those that a cut leaves in front: what the tokenizer writes there, or a BOS."""
        if self._in_front and prompt[: len(self._in_front)] == self._in_front:
            return self._in_front
        return [self._bos] if self._bos is not None and prompt[:1] == [self._bos] else []


def _has_equal(sides: Sequence[TokenizedSide]) -> bool:
    return any(one == other for one, other in itertools.combinations(sides, 2))


def _num_response(side: TokenizedSide) -> int:
    return len(side.input_ids) - side.num_prompt


def _start_of(error: LostPartError) -> str:
    """The beginning of what is left out."""
    more = len(error.lost) - _MOST_SHOWN
    return f"{error.lost[:_MOST_SHOWN]!r}" + (f" and {more} characters more" if more > 0 else "")
