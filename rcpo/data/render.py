"""From records to whole texts: what the chat template writes, and where in it the response begins and ends.

Owns chat templates. Does not tokenise: `rcpo.data.tokenize` does, and calls this.

The response begins where inference begins: behind the text that the template renders with
`add_generation_prompt=True`. Whatever stands behind that text is scored, since the model has to write it:
the channel of gpt-oss, Qwen3's empty think block unless `enable_thinking=false` puts it into the generation
prompt. The response ends with the token that ends generation; what the template writes behind that token is
cut. Where a template's whole conversation lacks a part of its generation prompt (DeepSeek-R1's "<think>"),
the response begins behind what both have, which is said.

A template's frame around a response is learnt once, from a conversation whose response is known, since the
text that a row's prompt and whole conversation have in common may run on into its response.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.data.generation import end_tokens, generation_of, special_tokens
from rcpo.data.messages import Messages
from rcpo.data.records import BadRowError, PreferenceRecord

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""model.chat_template=plain: turns as "User: ..." and "Assistant: ...", for base models. It ends a prompt
before the space, so that a response begins with the token that a model trained on text expects."""

_STAND_IN = "\u241fresponse\u241f"
"""Stands for a response where a template is looked at; its first character is in no template."""


_OPENED = re.compile(r"<([\w:]*(?:think|thought|reason)[\w:]*)>\s*$")
"""A tag of reasoning that a generation prompt leaves open."""
_REASONING = ("reasoning_content", "thinking")
"""Two names of one thing; a template knows one of them."""


@dataclass(frozen=True)
class Template:
    """What a chat template puts around every response."""

    header: int
    """Characters of the generation prompt."""
    overhang: str
    """What the generation prompt ends with, and the whole conversation lacks ("<think>", say)."""
    lead: str
    """Text between what both have of the generation prompt and the response's own; it is scored."""
    tail: str
    """Text behind the response's own."""
    closing: str
    """The part of `tail` that belongs to the response: up to the token that ends generation, else up to the
    first special token, else up to white space."""
    is_closed: bool
    """Whether `closing` ends with one of these tokens, so that no EOS is due."""
    notes: tuple[str, ...]
    """Where answered conversations are not what inference sees or ends with."""


@dataclass(frozen=True)
class Rendered:
    """Both sides of a record as whole texts."""

    chosen: str
    rejected: str
    split: int
    """Characters of the prompt, with which both texts begin."""
    is_closed: bool
    """Whether the texts end with the token that ends the response."""
    is_chat: bool
    """Whether a template has written the texts, with their BOS, if there is one."""


class LostPartError(BadRowError):
    """A response of which the template leaves something out."""

    def __init__(self, reason: str, lost: str) -> None:
        super().__init__(reason)
        self.lost = lost


def look_at_template(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] = MappingProxyType({})
) -> Template:
    """Learn the template's frame, given these `kwargs`, from one conversation whose response is known."""
    turns = [{"role": "user", "content": "user"}]
    answered = [*turns, {"role": "assistant", "content": _STAND_IN}]
    try:
        prompt = _apply(tokenizer, turns, True, kwargs)
        whole = _apply(tokenizer, answered, False, kwargs)
    except BadRowError as error:
        raise UserError(f"model.chat_template: {error}; type model.chat_template=plain") from None
    if _STAND_IN not in whole:
        raise UserError(
            "model.chat_template: the template does not show an assistant turn; "
            "type model.chat_template=plain"
        )
    header = len(prompt) - _num_common(prompt, _apply_quietly(tokenizer, turns, kwargs))
    overhang = prompt[_num_common(prompt, whole) :]
    tail = whole.partition(_STAND_IN)[2]
    continued = _apply_quietly(tokenizer, [*answered, *turns], kwargs).partition(_STAND_IN)[2]
    closing, is_closed, note = _end_of_turn(tokenizer, tail, continued)
    notes = [note] if note is not None else []
    lead = whole[len(prompt) - len(overhang) : whole.index(_STAND_IN)]
    if generation_of(tokenizer).response == "template":
        notes += _notes_on_start(tokenizer, overhang.strip(), " ".join(lead.split()), kwargs)
    return Template(header, overhang, lead, tail, closing, is_closed, tuple(notes))


def _notes_on_start(
    tokenizer: PreTrainedTokenizerBase, overhang: str, lead: str, kwargs: Mapping[str, Any]
) -> list[str]:
    notes = []
    if overhang:
        notes.append(
            f"the chat template ends its generation prompt with {overhang}, and leaves that out where it "
            "writes a response, which is trained so; model.response=verbatim puts responses behind it"
        )
    if lead:
        can_switch = "enable_thinking" in str(tokenizer.chat_template) and "enable_thinking" not in kwargs
        switch = "model.chat_template_kwargs='{enable_thinking: false}' may put it into the prompt"
        notes.append(
            f"the chat template writes {lead} in front of a response; it is scored, since inference begins "
            "before it" + (f"; {switch}" if can_switch else "")
        )
    return notes


def _end_of_turn(
    tokenizer: PreTrainedTokenizerBase, tail: str, continued: str
) -> tuple[str, bool, str | None]:
    """What of `tail` the model has to write, whether that ends the turn, and a note where it does not end
    generation. `continued` is the tail where another turn follows: GLM-4's template writes nothing behind an
    answer, and the next turn's <|user|> is what ends it."""
    ends, special = end_tokens(tokenizer), special_tokens(tokenizer)
    if (closing := _up_to_first(ends, tail)) is not None:
        return closing, True, None
    following = _up_to_first(ends | special, continued)
    if not tail.strip() and following is not None and following.strip() in ends:
        return following, True, None
    if (closing := _up_to_first(special, tail)) is None:
        return tail.rstrip(), False, None
    if not ends:
        return closing, True, None
    note = (
        f"the chat template ends a turn with {closing.strip()}, and generation does not end there but at "
        f"{', '.join(sorted(ends))}; a model that is to stop needs it as eos_token_id in "
        "generation_config.json"
    )
    return closing, True, note


def _up_to_first(tokens: set[str], text: str) -> str | None:
    """`text` up to the end of the first of `tokens` in it; None where there is none."""
    places = [text.index(token) + len(token) for token in tokens if token in text]
    return text[: min(places)] if places else None


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    turns: Messages,
    generation_prompt: bool,
    kwargs: Mapping[str, Any],
    tools: list[Any] | None = None,
    documents: list[Any] | None = None,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [_with_both_names(turn) for turn in turns],
                tools=tools,
                documents=documents,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **kwargs,
            )
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadRowError(f"the chat template refuses it ({reason[0][:200]})") from None


def _apply_quietly(tokenizer: PreTrainedTokenizerBase, turns: Messages, kwargs: Mapping[str, Any]) -> str:
    """Without a generation prompt; nothing where the template refuses."""
    try:
        return _apply(tokenizer, turns, False, kwargs)
    except BadRowError:
        return ""


def _with_both_names(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn's reasoning under either name: Qwen3's template reads reasoning_content, gpt-oss's thinking."""
    said = [turn[name] for name in _REASONING if name in turn]
    return {**turn, **dict.fromkeys(_REASONING, said[0])} if len(said) == 1 else turn


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    record: PreferenceRecord,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> Rendered:
    """Both sides as the template writes them, given `kwargs`. Raises BadRowError where it refuses the row, or
    leaves out a part of a response.

    With model.response=verbatim each side is the generation prompt, the response's content as it is, and the
    template's end of turn."""
    assert isinstance(record.prompt, list)
    assert isinstance(record.chosen, list)
    assert isinstance(record.rejected, list)
    sides, given = (record.chosen, record.rejected), (kwargs, record.tools, record.documents)
    prompt = _apply(tokenizer, record.prompt, True, *given)
    turn_start = len(prompt) - template.header
    if generation_of(tokenizer).response == "verbatim":
        opened, ends = _OPENED.search(prompt, turn_start), tuple(end_tokens(tokenizer))
        texts = [prompt + _verbatim(side[-1], opened, template.closing, ends) for side in sides]
        return Rendered(texts[0], texts[1], len(prompt), template.is_closed, True)
    wholes = [_apply(tokenizer, record.prompt + side, False, *given) for side in sides]
    split = len(prompt)
    if not all(whole.startswith(prompt) for whole in wholes):
        split -= len(template.overhang)
    texts = []
    for side, whole in zip(sides, wholes, strict=True):
        start = split
        if whole[:split] != prompt[:split]:
            start = _start_once_answered(tokenizer, template, record, whole, prompt[turn_start:split], given)
        _check_whole(side[-1], whole[start - split + turn_start :], whole[start:])
        texts.append(prompt[:split] + _up_to_end(tokenizer, template, whole[start:]))
    return Rendered(texts[0], texts[1], split, template.is_closed, True)


def _start_once_answered(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    record: PreferenceRecord,
    whole: str,
    header: str,
    given: tuple[Any, ...],
) -> int:
    """Where in `whole` a response begins, of a prompt that the template renders in another way once it is
    answered: gpt-oss's then cuts what was thought before tool calls, which inference still sees. Raises
    BadRowError where `header`, which the generation prompt ends with, is not in front of the response."""
    turns = [*record.prompt, {"role": "assistant", "content": _STAND_IN}]
    front = _apply(tokenizer, turns, False, *given).partition(_STAND_IN)[0].removesuffix(template.lead)
    if not header or not front.endswith(header):
        raise BadRowError("the chat template renders its prompt in another way once it is answered")
    if not whole.startswith(front):
        raise BadRowError(
            "a response does not begin as the generation prompt ends (with an empty think block, say)"
        )
    return len(front)


def _up_to_end(tokenizer: PreTrainedTokenizerBase, template: Template, written: str) -> str:
    """A response with the end of its turn. A turn that calls a tool may end with a token of its own."""
    if written.endswith(template.tail):
        return written[: len(written) - len(template.tail)] + template.closing
    if template.is_closed and written.rstrip().endswith(tuple(special_tokens(tokenizer))):
        return written.rstrip()
    raise BadRowError("the chat template renders its end in another way than usual")


def _verbatim(turn: dict[str, Any], opened: re.Match[str] | None, closing: str, ends: tuple[str, ...]) -> str:
    """A response as it is written, behind a generation prompt that may have `opened` a block of reasoning,
    and `closing`, if it does not end with one of `ends` itself."""
    text = str(turn["content"])
    reasoning = next((str(turn[name]).strip() for name in _REASONING if name in turn), None)
    if "tool_calls" in turn:
        raise BadRowError("model.response=verbatim writes no tool calls; write them into content")
    if reasoning is not None:
        if opened is None:
            raise BadRowError("model.response=verbatim writes content alone; write the reasoning into it")
        text = f"{reasoning}\n</{opened[1]}>\n\n{text}"
    elif opened is not None:
        start = opened[0] if text.lstrip().startswith(opened[0]) else f"<{opened[1]}>"
        if text.lstrip().startswith(start):
            text = text.lstrip().removeprefix(start)
        if f"</{opened[1]}>" not in text:
            raise BadRowError(
                f"the generation prompt opens <{opened[1]}>, and a response does not close it; write "
                f"responses as REASONING</{opened[1]}>ANSWER"
            )
    return text.rstrip() if text.rstrip().endswith(ends) else text + closing


_VERBATIM = "model.response=verbatim trains responses as they are written"


def _check_whole(turn: dict[str, Any], written: str, response: str) -> None:
    """Raise LostPartError where a part of a response is not in what the template has written of its turn,
    white space aside. `response` is what of `written` is scored."""
    there, scored = "".join(written.split()), "".join(response.split())
    said = "the chat template leaves out"
    for key in ("content", *_REASONING):
        text = turn.get(key)
        if isinstance(text, str) and "".join(text.split()) not in there:
            what = (
                "a part of the response (its reasoning, say)" if key == "content" else f"the response's {key}"
            )
            raise LostPartError(f"{said} {what}; {_VERBATIM}", _lost(text, scored))
    for call in turn.get("tool_calls", ()):
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict) and str(function.get("name", "")) not in written:
            raise LostPartError(f"{said} the response's tool calls", json.dumps(function, default=str))


def _lost(text: str, there: str) -> str:
    """What of `text` is not `there`, which has no white space: all but its longest beginning or its longest
    end that is."""
    places = [place for place, char in enumerate(text) if not char.isspace()]
    bare = "".join(text[place] for place in places)
    sizes = range(1, len(bare))
    start = bisect_right(sizes, False, key=lambda size: bare[:size] not in there)
    end = bisect_right(sizes, False, key=lambda size: bare[-size:] not in there)
    return text[places[start] :] if start > end else text[: places[len(bare) - end - 1] + 1]


def ignores(
    tokenizer: PreTrainedTokenizerBase, record: PreferenceRecord, kwargs: Mapping[str, Any], part: str
) -> bool:
    """Whether the template writes this record's prompt alike without its `part`: "tools" or "documents"."""
    assert isinstance(record.prompt, list)
    given = {"tools": record.tools, "documents": record.documents}
    return _apply(tokenizer, record.prompt, True, kwargs, **given) == _apply(
        tokenizer, record.prompt, True, kwargs, **{**given, part: None}
    )


def render_text(record: PreferenceRecord) -> Rendered:
    assert isinstance(record.prompt, str)
    assert isinstance(record.chosen, str)
    assert isinstance(record.rejected, str)
    prompt = record.prompt
    return Rendered(
        prompt + record.chosen, prompt + record.rejected, len(prompt), is_closed=False, is_chat=False
    )


def _num_common(first: str, second: str) -> int:
    """Length of the common beginning."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def apply_chat_template_choice(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Set the tokenizer's chat template: None keeps its own, "plain" sets `PLAIN_TEMPLATE`, else a jinja
    file.

    Raises UserError where the file is missing or cannot render a user and an assistant turn.
    """
    if choice is None:
        return
    if choice == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
        return
    path = Path(choice).expanduser()
    if not path.is_file():
        raise UserError(
            f"model.chat_template={choice}: no such file; give a jinja file, or type plain or null"
        )
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"model.chat_template={choice}: is not UTF-8 text; give a jinja file") from None
    look_at_template(tokenizer)
