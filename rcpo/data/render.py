"""From records to whole texts: where in what the chat template writes a response begins and ends.

Owns what of a rendered row is scored. Does not tokenise: `rcpo.data.tokenize` does, and calls this.

The response begins where inference begins: behind the text that the template renders with
`add_generation_prompt=True`. Whatever stands behind that text is scored, since the model has to write it:
the channel of gpt-oss, Qwen3's empty think block unless `enable_thinking=false` puts it into the generation
prompt. The response ends with the token that ends generation; what the template writes behind that token is
cut. Where a template's whole conversation lacks a part of its generation prompt (DeepSeek-R1's "<think>"),
the response begins behind what both have, which is said.
"""

import dataclasses
import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from rcpo.data.generation import end_tokens, generation_of, special_tokens
from rcpo.data.pictures import Pictures
from rcpo.data.template import REASONING, STAND_IN, Template, apply, taken_apart
from rcpo.records.messages import PLACE, Messages, without_system
from rcpo.records.record import BadRowError, PreferenceRecord

_OPENED = re.compile(r"<([\w:]*(?:think|thought|reason)[\w:]*)>\s*$")
"""A tag of reasoning that a generation prompt leaves open."""


@dataclass(frozen=True)
class Rendered:
    """The responses of a record, each with its prompt as a whole text."""

    texts: tuple[str, ...]
    """The chosen one and the rejected one, and the gold one if there is one; of a list all, the best
    first."""
    split: int
    """Characters of the prompt, with which all texts begin."""
    is_closed: bool
    """Whether the texts end with the token that ends the response."""
    is_chat: bool
    """Whether a template has written the texts, with their BOS, if there is one."""
    pictures: Pictures | None = None
    """The prompt's images, for whose tokens the texts have room."""
    spans: tuple[tuple[int, int], ...] = ()
    """Of a conversation with several answers: where each begins and ends, in characters; empty: all behind
    `split` is scored."""


class LostPartError(BadRowError):
    """A response of which the template leaves something out."""

    def __init__(self, reason: str, lost: str) -> None:
        super().__init__(reason)
        self.lost = lost


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    record: PreferenceRecord,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> Rendered:
    """All sides as the template writes them, given `kwargs`. Raises BadRowError where it refuses the row, or
    leaves out a part of a response.

    With model.response=verbatim each side is the generation prompt, the response's content as it is, and the
    template's end of turn."""
    assert isinstance(record.prompt, list)
    turns, sides = record.prompt, [side for side in record.rendered if isinstance(side, list)]
    if template.takes_apart and generation_of(tokenizer).response == "template":
        turns, *sides = [[taken_apart(turn) for turn in part] for part in (turns, *sides)]
    given = (kwargs, record.tools, record.documents)
    prompt = apply(tokenizer, turns, True, *given)
    turn_start = len(prompt) - template.header
    if generation_of(tokenizer).response == "verbatim":
        opened, ends = _OPENED.search(prompt, turn_start), tuple(end_tokens(tokenizer))
        texts = [prompt + _verbatim(side[-1], opened, template.closing, ends) for side in sides]
        return Rendered(tuple(texts), len(prompt), template.is_closed, True)
    wholes = [apply(tokenizer, turns + side, False, *given) for side in sides]
    split = len(prompt)
    if not all(whole.startswith(prompt) for whole in wholes):
        split -= len(template.overhang)
    texts = []
    for side, whole in zip(sides, wholes, strict=True):
        start = split
        if whole[:split] != prompt[:split]:
            start = _start_once_answered(tokenizer, template, turns, whole, prompt[turn_start:split], given)
        check_whole(side[-1], whole[start - split + turn_start :], whole[start:], prompt)
        closing = template.closing_of_calls if "tool_calls" in side[-1] else template.closing
        texts.append(prompt[:split] + up_to_end(tokenizer, template, whole[start:], closing))
    return Rendered(tuple(texts), split, template.is_closed, True)


def _start_once_answered(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    turns: Messages,
    whole: str,
    header: str,
    given: tuple[Any, ...],
) -> int:
    """Where in `whole` a response begins, of a prompt that the template renders in another way once it is
    answered: gpt-oss's then cuts what was thought before tool calls, which inference still sees. Raises
    BadRowError where `header`, which the generation prompt ends with, is not in front of the response."""
    answered = [*turns, {"role": "assistant", "content": STAND_IN}]
    front = apply(tokenizer, answered, False, *given).partition(STAND_IN)[0].removesuffix(template.lead)
    if not header or not front.endswith(header):
        raise BadRowError("the chat template renders its prompt in another way once it is answered")
    if not whole.startswith(front):
        raise BadRowError(
            "a response does not begin as the generation prompt ends (with an empty think block, say)"
        )
    return len(front)


def up_to_end(tokenizer: PreTrainedTokenizerBase, template: Template, written: str, closing: str) -> str:
    """A response with the end of its turn. A turn that calls a tool may end with a token of its own."""
    if written.endswith(template.tail):
        return written[: len(written) - len(template.tail)] + closing
    if template.is_closed and written.rstrip().endswith(tuple(special_tokens(tokenizer))):
        return written.rstrip()
    raise BadRowError("the chat template renders its end in another way than usual")


def _verbatim(turn: dict[str, Any], opened: re.Match[str] | None, closing: str, ends: tuple[str, ...]) -> str:
    """A response as it is written, behind a generation prompt that may have `opened` a block of reasoning,
    and `closing`, if it does not end with one of `ends` itself."""
    text = str(turn["content"])
    reasoning = next((str(turn[name]).strip() for name in REASONING if name in turn), None)
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


def check_whole(turn: dict[str, Any], written: str, response: str, prompt: str) -> None:
    """Raise LostPartError where a part of a response is not in what the template has written of its turn,
    white space aside. `response` is what of `written` is scored; `prompt` ends as inference begins."""
    there, scored = "".join(written.split()), "".join(response.split())
    said = "the chat template leaves out"
    if "".join(turn["content"].split()) not in there:
        lost = _lost(turn["content"], scored)
        raise LostPartError(f"{said} a part of the response (its reasoning, say); {_VERBATIM}", lost)
    for key in REASONING:
        text = turn.get(key)
        if isinstance(text, str) and "".join(text.split()) not in there:
            advice = _VERBATIM if _OPENED.search(prompt) else "write it into content, or leave it out"
            raise LostPartError(f"{said} the response's {key}; {advice}", text)
    for function in map(_function_of, turn.get("tool_calls", ())):
        if str(function.get("name", "")) not in written:
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


def unwritten(turns: Messages, prompt: str) -> set[str]:
    """What of a prompt's turns is not in `prompt`, as the template has written it: system and user turns,
    white space aside, tool calls and names. What was answered and thought in earlier turns may be cut there,
    as at inference."""
    found = set()
    for turn in turns:
        text, name = turn["content"], turn.get("name")
        there = "".join(prompt.split())
        is_said = text.strip() in prompt or all("".join(part.split()) in there for part in text.split(PLACE))
        if turn["role"] in ("system", "developer", "user") and not is_said:
            found.add(f"a {turn['role']} turn")
        if name is not None and str(name) not in prompt:
            found.add("a name of a message")
        if any(str(_function_of(call).get("name", "")) not in prompt for call in turn.get("tool_calls", ())):
            found.add("tool calls in the prompt")
    return found


def _function_of(call: Any) -> dict[str, Any]:
    """What a tool call calls."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    return function if isinstance(function, dict) else {}


def takes_merged(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    record: PreferenceRecord,
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether the template, which refuses this record, takes it with its system turn in the user's."""
    assert isinstance(record.prompt, list)
    merged = without_system(record.prompt, "merge")
    try:
        render_messages(tokenizer, template, dataclasses.replace(record, prompt=merged), kwargs)
    except BadRowError:
        return False
    return merged != record.prompt


def ignores(
    tokenizer: PreTrainedTokenizerBase, record: PreferenceRecord, kwargs: Mapping[str, Any], part: str
) -> bool:
    """Whether the template writes this record's prompt alike without its `part`: "tools" or "documents"."""
    assert isinstance(record.prompt, list)
    given = {"tools": record.tools, "documents": record.documents}
    return apply(tokenizer, record.prompt, True, kwargs, **given) == apply(
        tokenizer, record.prompt, True, kwargs, **{**given, part: None}
    )


def render_text(record: PreferenceRecord) -> Rendered:
    assert isinstance(record.prompt, str)
    prompt = record.prompt
    texts = tuple(f"{prompt}{side}" for side in record.rendered)
    return Rendered(texts, len(prompt), is_closed=False, is_chat=False)
