"""From records to whole texts: what the chat template writes, and where in it the response begins and ends.

Owns chat templates. Does not tokenise: `rcpo.data.tokenize` does, and calls this. A template's frame around a
response (what of the generation prompt the whole conversation keeps, what stands behind the response) is
learnt once, from a conversation whose response is known, since the text that a row's prompt and whole
conversation have in common may run on into its response.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError
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


@dataclass(frozen=True)
class Template:
    """What a chat template puts around every response."""

    overhang: int
    """Characters at the end of the generation prompt that the whole conversation lacks (a "<think>", say)."""
    lead: str
    """Text between the generation prompt and the response that no one has said: Qwen3's empty think block,
    say. Empty where it is white space, which is the beginning of a response's first token."""
    tail: str
    """Text behind the response's own."""
    closing: str
    """The part of `tail` that belongs to the response: up to its first special token, or up to white
    space."""
    is_closed: bool
    """Whether `closing` ends with a special token, so that no EOS is due."""


@dataclass(frozen=True)
class Rendered:
    """Both sides of a record as whole texts."""

    chosen: str
    rejected: str
    split: int
    """Characters of the prompt, with which both texts begin."""
    is_closed: bool


def look_at_template(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] = MappingProxyType({})
) -> Template:
    """Learn the template's frame, given these `kwargs`, from one conversation whose response is known."""
    turns = [{"role": "user", "content": "user"}]
    try:
        prompt = _apply(tokenizer, turns, True, kwargs)
        whole = _apply(tokenizer, [*turns, {"role": "assistant", "content": _STAND_IN}], False, kwargs)
    except BadRowError as error:
        raise UserError(f"model.chat_template: {error}; type model.chat_template=plain") from None
    if _STAND_IN not in whole:
        raise UserError(
            "model.chat_template: the template does not show an assistant turn; "
            "type model.chat_template=plain"
        )
    tail = whole[whole.index(_STAND_IN) + len(_STAND_IN) :]
    special = [str(token) for token in tokenizer.convert_ids_to_tokens(list(special_ids(tokenizer)))]
    ends = [tail.index(token) + len(token) for token in special if token in tail]
    closing = tail[: min(ends)] if ends else tail.rstrip()
    kept = next((i for i in range(len(prompt)) if prompt[i : i + 1] != whole[i : i + 1]), len(prompt))
    lead = whole[kept : whole.index(_STAND_IN)]
    return Template(len(prompt) - kept, lead if lead.strip() else "", tail, closing, bool(ends))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of special tokens, those included that have no role of their own (`<|eot_id|>`, say)."""
    added = {idx for idx, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    turns: Messages,
    generation_prompt: bool,
    kwargs: Mapping[str, Any],
    tools: list[Any] | None = None,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=generation_prompt, **kwargs
            )
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadRowError(f"the chat template refuses it ({reason[0][:200]})") from None


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    record: PreferenceRecord,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> Rendered:
    """Both sides as the template writes them, given `kwargs`. Raises BadRowError where it refuses the row, or
    leaves out a part of a response."""
    assert isinstance(record.prompt, list)
    prompt = _apply(tokenizer, record.prompt, True, kwargs, record.tools)
    split = len(prompt) - template.overhang
    behind_lead = split + len(template.lead)
    texts = []
    for side in (record.chosen, record.rejected):
        assert isinstance(side, list)
        whole = _apply(tokenizer, record.prompt + side, False, kwargs, record.tools)
        if whole[:split] != prompt[:split] or not whole.endswith(template.tail):
            raise BadRowError("the chat template renders its prompt or its end in another way than usual")
        if (lost := _lost_part(side[-1], whole[split:])) is not None:
            raise BadRowError(f"the chat template leaves out {lost}")
        texts.append(whole[: len(whole) - len(template.tail)] + template.closing)
    # A template may leave its lead out where a response has one of its own, which is then scored.
    if all(text[split:behind_lead] == template.lead for text in texts):
        split = behind_lead
    return Rendered(texts[0], texts[1], split, template.is_closed)


def _lost_part(turn: dict[str, Any], written: str) -> str | None:
    """What of a response is not in what the template has written of it, white space aside."""
    there = "".join(written.split())
    if "".join(turn["content"].split()) not in there:
        return "a part of the response (its reasoning, say)"
    for key in ("reasoning_content", "thinking"):
        if isinstance(turn.get(key), str) and "".join(turn[key].split()) not in there:
            return f"the response's {key}"
    for call in turn.get("tool_calls", ()):
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict) and str(function.get("name", "")) not in written:
            return "the response's tool calls"
    return None


def render_text(record: PreferenceRecord) -> Rendered:
    assert isinstance(record.prompt, str)
    assert isinstance(record.chosen, str)
    assert isinstance(record.rejected, str)
    prompt = record.prompt
    return Rendered(prompt + record.chosen, prompt + record.rejected, len(prompt), is_closed=False)


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
