"""Conversations with several answers: which characters of what the chat template writes are an assistant's.

Owns the spans of inner turns. `rcpo.data.render` renders rows of one answer, and this calls its parts;
`rcpo.data.tokenize` calls this.

The text is that of the whole conversation. An answer begins where inference begins it: behind the text that
the template renders of the turns before it with `add_generation_prompt=True`, which the whole must begin
with. It ends with the token that ends it there, before the header of the turn behind it. So an answer is
scored as it would be in a row of its own. Where the whole does not begin as its parts are written, the
template's own marks ({% generation %}) say what is an assistant's; where it has none the row is refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rcpo.common.errors import UserError
from rcpo.data.generation import end_tokens, generation_of
from rcpo.data.render import Rendered, check_whole, up_to_end
from rcpo.data.template import STAND_IN, Template, apply, taken_apart
from rcpo.records.messages import Messages
from rcpo.records.record import BadRowError, PreferenceRecord

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_UNSTABLE = (
    "the chat template writes an earlier turn in another way once the conversation goes on, so that it "
    "cannot be told which tokens are the assistant's; mark them in it with {% generation %}, or give each "
    "answer a row"
)


class _UnstableError(Exception):
    """The whole does not begin as its parts are written."""


def is_conversation(record: PreferenceRecord) -> bool:
    """Whether a record has several answers, one after the other."""
    return record.label is not None and isinstance(record.chosen, list) and len(record.chosen) > 1


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    record: PreferenceRecord,
    kwargs: Mapping[str, Any],
) -> Rendered:
    """The whole conversation as the template writes it, with the spans of its answers. Raises BadRowError
    where it refuses the row, leaves out a part of an answer, or does not let answers be told, and UserError
    for a tokenizer without offsets."""
    assert isinstance(record.prompt, list)
    assert isinstance(record.chosen, list)
    if not tokenizer.is_fast:
        raise UserError(
            f"data: row {record.row} (counted from 0) has several answers, which cannot be told among the "
            f"tokens of {type(tokenizer).__name__}: it gives no offsets; give rows of one answer, or a model "
            "with a fast tokenizer"
        )
    if generation_of(tokenizer).response == "verbatim":
        raise BadRowError(
            "model.response=verbatim writes one answer behind a prompt, and a conversation has several"
        )
    turns = [*record.prompt, *record.chosen]
    if template.takes_apart:
        turns = [taken_apart(turn) for turn in turns]
    given = (kwargs, record.tools, record.documents)
    whole = apply(tokenizer, turns, False, *given)
    try:
        spans, text = _by_beginnings(tokenizer, template, turns, whole, given)
    except _UnstableError:
        spans, text = _by_marks(tokenizer, turns, whole, given), whole
        text = text[: spans[-1][1]]
    closed = template.is_closed or text.endswith(tuple(end_tokens(tokenizer)))
    return Rendered((text,), spans[0][0], closed, True, spans=tuple(spans))


def _by_beginnings(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    turns: Messages,
    whole: str,
    given: tuple[Any, ...],
) -> tuple[list[tuple[int, int]], str]:
    """Where answers begin and end, and the text up to the end of the last one."""
    spans: list[tuple[int, int]] = []
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    for place in answers:
        prompt = apply(tokenizer, turns[:place], True, *given)
        start = len(prompt) if whole.startswith(prompt) else len(prompt) - len(template.overhang)
        if whole[:start] != prompt[:start]:
            raise _UnstableError
        stop = len(whole)
        if place != answers[-1]:
            stop = _end_of_inner(tokenizer, template, turns[: place + 2], whole, start, given)
        written = whole[start:stop]
        check_whole(turns[place], whole[len(prompt) - template.header : stop], written, prompt)
        if place == answers[-1]:
            closing = template.closing_of_calls if "tool_calls" in turns[place] else template.closing
            text = whole[:start] + up_to_end(tokenizer, template, written, closing)
            stop = len(text)
        spans.append((start, stop))
    return spans, text


def _end_of_inner(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    turns: Messages,
    whole: str,
    start: int,
    given: tuple[Any, ...],
) -> int:
    """Where the answer that begins at `start` ends, the last but one of `turns`: with the last token in front
    of the next turn's content that ends answers, or in front of all that the template puts there."""
    known = [*turns[:-1], {**turns[-1], "content": STAND_IN}]
    front = apply(tokenizer, known, False, *given).partition(STAND_IN)[0]
    if not whole.startswith(front):
        raise _UnstableError
    written = front[start:]
    ends = {*end_tokens(tokenizer), *filter(None, (template.between, template.closing_of_calls))}
    places = [written.rindex(end) + len(end) for end in ends if end in written]
    if places:
        return start + max(places)
    if not template.gap or not written.endswith(template.gap):
        raise _UnstableError
    return len(front) - len(template.gap)


def _by_marks(
    tokenizer: PreTrainedTokenizerBase, turns: Messages, whole: str, given: tuple[Any, ...]
) -> list[tuple[int, int]]:
    """What the template marks as an assistant's."""
    kwargs, tools, documents = given
    chat_template = tokenizer.get_chat_template(None, tools)
    if not _MARKS.search(chat_template):
        raise BadRowError(_UNSTABLE)
    texts, marked = render_jinja_template(
        conversations=[turns],
        tools=tools,
        documents=documents,
        chat_template=chat_template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **kwargs},
    )
    spans = [(start, stop) for start, stop in marked[0] if start < stop]
    if texts[0] != whole or not spans or spans[0][0] == 0:
        raise BadRowError("the chat template marks no answer of it with {% generation %}")
    return spans


def scored_tokens(
    batch: BatchEncoding, idx: int, first: int, spans: Sequence[tuple[int, int]], special: set[int]
) -> NDArray[np.bool_] | None:
    """Which tokens of text `idx` from `first` on hold a character of these spans; None where all do, and
    without spans. A token of `special` that begins before a span is a marker that swallows white space."""
    if not spans:
        return None
    starts, stops = np.array(batch.encodings[idx].offsets, dtype=np.int64).reshape(-1, 2).T
    is_special = np.isin(batch["input_ids"][idx], list(special))
    scored = np.zeros(len(starts), np.bool_)
    for start, stop in spans:
        scored |= (starts < stop) & (stops > start) & ((starts >= start) | ~is_special)
    return fitted(scored[first:], len(scored) - first)


def fitted(scored: NDArray[np.bool_] | None, num_tokens: int) -> NDArray[np.bool_] | None:
    """A mask of a response's tokens once these are `num_tokens`: an end that was added is scored. None where
    all are."""
    if scored is None:
        return None
    scored = np.concatenate([scored[:num_tokens], np.ones(max(0, num_tokens - len(scored)), np.bool_)])
    return None if scored.all() else scored
