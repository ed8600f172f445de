"""Chat templates: which one a tokenizer has, how it is asked, and what it puts around every response.

Owns the frame of a response, which is learnt once, from a conversation whose response is known, since the
text that a row's prompt and whole conversation have in common may run on into its response. Does not render
rows: `rcpo.data.render` does, and calls this.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.data.generation import end_ids, end_tokens, generation_of, special_ids, special_tokens
from rcpo.data.pictures import in_parts
from rcpo.records.messages import Messages
from rcpo.records.record import BadRowError

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""model.chat_template=plain: turns as "User: ..." and "Assistant: ...", for base models. It ends a prompt
before the space, so that a response begins with the token that a model trained on text expects."""
STAND_IN = "\u241fresponse\u241f"
"""Stands for a response where a template is looked at; its first character is in no template."""
_INLINE = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*(.*)", re.DOTALL)
"""Reasoning at the head of content, and the answer."""
REASONING = ("reasoning_content", "thinking")
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
    closing_of_calls: str
    """`closing` of a response that calls a tool: in GLM-4's format <|observation|>, not <|user|>."""
    gap: str
    """What stands between an answer and the content of a user's turn that follows it."""
    between: str
    """The part of `gap` that ends the answer, up to a token; empty where none does."""
    is_closed: bool
    """Whether `closing` ends with one of these tokens, so that no EOS is due."""
    takes_apart: bool
    """Whether <think>...</think> at the head of an answer is handed to the template as reasoning of its own,
    since it writes that otherwise than in content."""
    notes: tuple[str, ...]
    """Where answered conversations are not what inference sees or ends with."""


def look_at_template(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] = MappingProxyType({})
) -> Template:
    """Learn the template's frame, given these `kwargs`, from one conversation whose response is known."""
    turns = [{"role": "user", "content": "user"}]
    answered = [*turns, {"role": "assistant", "content": STAND_IN}]
    try:
        prompt = apply(tokenizer, turns, True, kwargs)
        whole = apply(tokenizer, answered, False, kwargs)
    except BadRowError as error:
        raise UserError(f"model.chat_template: {error}; type model.chat_template=plain") from None
    if STAND_IN not in whole:
        raise UserError(
            "model.chat_template: the template does not show an assistant turn; "
            "type model.chat_template=plain"
        )
    header = len(prompt) - num_common(prompt, _apply_quietly(tokenizer, turns, kwargs))
    overhang = prompt[num_common(prompt, whole) :]
    tail = whole.partition(STAND_IN)[2]
    continued = _apply_quietly(tokenizer, [*answered, *turns], kwargs).partition(STAND_IN)[2]
    closing, is_closed, note = _end_of_turn(tokenizer, tail, continued)
    notes = [note] if note is not None else []
    lead = whole[len(prompt) - len(overhang) : whole.index(STAND_IN)]
    if generation_of(tokenizer).response == "template":
        notes += _notes_on_start(tokenizer, overhang.strip(), " ".join(lead.split()), kwargs)
    takes_apart = _takes_apart(tokenizer, turns, lead, kwargs)
    of_calls = (
        closing if tail.strip() or not is_closed else _end_of_calls(tokenizer, turns, kwargs) or closing
    )
    gap, between = _between_turns(tokenizer, answered, kwargs)
    return Template(
        header, overhang, lead, tail, closing, of_calls, gap, between, is_closed, takes_apart, tuple(notes)
    )


def ends_of_answers(tokenizer: PreTrainedTokenizerBase, template: Template | None) -> list[int]:
    """Ids of the tokens that end an answer: those that end generation, and the one that training ends answers
    with; `template` is what was learnt of the tokenizer's, None where it has none."""
    found = end_ids(tokenizer)
    if template is not None and template.is_closed:
        closing = tokenizer(template.closing, add_special_tokens=False, verbose=False)["input_ids"]
        found |= set(closing[-1:]) & special_ids(tokenizer)
    return sorted(found)


def _takes_apart(
    tokenizer: PreTrainedTokenizerBase, turns: Messages, lead: str, kwargs: Mapping[str, Any]
) -> bool:
    """gpt-oss's template writes reasoning into a channel, and a <think> of content into the answer; others
    write an empty block in front of one of content."""
    inline = {"role": "assistant", "content": f"<think>\n{STAND_IN}\n</think>\n\nanswer"}
    as_content = _apply_quietly(tokenizer, [*turns, inline], kwargs)
    as_reasoning = _apply_quietly(tokenizer, [*turns, taken_apart(inline)], kwargs)
    is_doubled = bool(lead.strip()) and lead + "<think>" in as_content
    return STAND_IN in as_reasoning and (is_doubled or "</think>" not in as_reasoning)


def taken_apart(turn: dict[str, Any]) -> dict[str, Any]:
    """An assistant's turn with the block at the head of its content as reasoning of its own."""
    found = _INLINE.fullmatch(turn["content"]) if turn["role"] == "assistant" else None
    if found is None or any(name in turn for name in REASONING):
        return turn
    return {**turn, "content": found[2], "reasoning_content": found[1].strip()}


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


def _between_turns(
    tokenizer: PreTrainedTokenizerBase, answered: Messages, kwargs: Mapping[str, Any]
) -> tuple[str, str]:
    """`Template.gap` and `Template.between`: up to a token that ends generation, else up to the first special
    one in front of the user's header, which a conversation begins with too."""
    asked = {"role": "user", "content": STAND_IN}
    header = _apply_quietly(tokenizer, [asked], kwargs).partition(STAND_IN)[0]
    gap = _apply_quietly(tokenizer, [*answered, asked], kwargs).partition(STAND_IN)[2].partition(STAND_IN)[0]
    own = gap[: len(gap) - num_common(gap[::-1], header[::-1])]
    ended = _up_to_first(end_tokens(tokenizer), gap) or _up_to_first(special_tokens(tokenizer), own)
    return gap, ended or ""


def _end_of_calls(
    tokenizer: PreTrainedTokenizerBase, turns: Messages, kwargs: Mapping[str, Any]
) -> str | None:
    """What ends a turn that calls a tool, where the tool's turn is what ends it; None where nothing does."""
    call = {"type": "function", "function": {"name": "name", "arguments": {}}}
    called = [*turns, {"role": "assistant", "content": "", "tool_calls": [call]}]
    before = _apply_quietly(tokenizer, called, kwargs)
    whole = _apply_quietly(tokenizer, [*called, {"role": "tool", "content": STAND_IN}], kwargs)
    if not before or not whole.startswith(before):
        return None
    ends = end_tokens(tokenizer)
    following = _up_to_first(ends | special_tokens(tokenizer), whole[len(before) :])
    return following if following is not None and following.strip() in ends else None


def _up_to_first(tokens: set[str], text: str) -> str | None:
    """`text` up to the end of the first of `tokens` in it; None where there is none."""
    places = [text.index(token) + len(token) for token in tokens if token in text]
    return text[: min(places)] if places else None


def apply(
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
                in_parts(tokenizer, [_with_both_names(turn) for turn in turns]),
                tools=tools,
                documents=documents,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **kwargs,
            )
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, TypeError) and (spelled := _with_spelled_arguments(turns)) != turns:
            return apply(tokenizer, spelled, generation_prompt, kwargs, tools, documents)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadRowError(f"the chat template refuses it ({reason[0][:200]})") from None


def _with_spelled_arguments(turns: Messages) -> Messages:
    """With the arguments of tool calls as JSON text, which DeepSeek's templates want and others do not."""
    found = []
    for turn in turns:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            if isinstance(call, dict) and isinstance(call.get("function", {}).get("arguments"), dict)
            else call
            for call in turn.get("tool_calls", ())
        ]
        found.append({**turn, "tool_calls": calls} if calls else turn)
    return found


def _apply_quietly(tokenizer: PreTrainedTokenizerBase, turns: Messages, kwargs: Mapping[str, Any]) -> str:
    """Without a generation prompt; nothing where the template refuses."""
    try:
        return apply(tokenizer, turns, False, kwargs)
    except BadRowError:
        return ""


def _with_both_names(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn's reasoning under either name: Qwen3's template reads reasoning_content, gpt-oss's thinking."""
    said = [turn[name] for name in REASONING if name in turn]
    return {**turn, **dict.fromkeys(REASONING, said[0])} if len(said) == 1 else turn


def num_common(first: Sequence[object], second: Sequence[object]) -> int:
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
