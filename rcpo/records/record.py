"""Preference records: the one shape every data source is read into, and how a row of a source becomes one.

Owns the formats (TRL's preference formats, UltraFeedback's, raw HH-RLHF strings) and what makes a row unfit
to train. Does not read files (`rcpo.records`), count or select (`rcpo.records.load`), or tokenise
(`rcpo.data.tokenize`).
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rcpo.common.errors import shortened
from rcpo.records.messages import (
    PLACE,
    ROLES,
    BadMessageError,
    Messages,
    content_text,
    parsed,
    spelled,
    turns,
)

if TYPE_CHECKING:
    from rcpo.records.images import Image
    from rcpo.records.weights import ResponseWeights

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PreferenceRecord:
    """One preference pair. Either all three parts are plain text, or all three are messages.

    Of a list of responses chosen is the best one and rejected the worst one."""

    prompt: str | Messages
    chosen: str | Messages
    """The response only, without the prompt."""
    rejected: str | Messages
    """The response only, without the prompt."""
    row: int
    """Row number in the source, counted from 0, for reports."""
    weight: float = 1.0
    """What multiplies the pair's loss, finite and >= 0 (`rcpo.records.weights`)."""
    tools: list[Any] | None = None
    """Definitions of tools, for the chat template."""
    documents: list[Any] | None = None
    """Documents to answer from, for the chat template."""
    label: bool | None = None
    """Of a single answer: whether it is a chosen one; it then stands on both sides. None: a pair."""
    template_kwargs: dict[str, Any] | None = None
    """What else this row's chat template is given: {"enable_thinking": false}, say."""
    between: tuple[str | Messages, ...] = ()
    """The other responses of a list, the best first."""
    gold: str | Messages | None = None
    """A third response to the prompt, of which the likelihood term is (objective.sft_of=gold)."""
    scores: tuple[float, ...] = ()
    """Of a list: of each response, the best first, the highest is best; empty: a pair."""
    of_responses: "ResponseWeights | None" = None
    """Where responses have weights of their own, which `weight` is made of: these, the best response's
    first."""

    @property
    def responses(self) -> list[str | Messages]:
        """All of them, the best first."""
        return [self.chosen, *self.between, self.rejected]

    @property
    def rendered(self) -> list[str | Messages]:
        """The responses, and the gold one behind them where there is one."""
        return self.responses if self.gold is None else [*self.responses, self.gold]

    images: tuple["Image", ...] = ()
    """Of the prompt, in the order of their places."""


class BadRowError(Exception):
    """A row that cannot train. The message is the reason, the same for every row with the same fault."""


def read_record(
    prompt: Any,
    chosen: Any,
    rejected: Any,
    row: int,
    tools: Any = None,
    documents: Any = None,
    template_kwargs: Any = None,
    label: bool | None = None,
) -> PreferenceRecord:
    """Turn one row into a record; `prompt` is None where the source has no prompt of its own.

    prompt        sides              becomes
    text          text               plain text, as it is
    none          text               plain text: what both begin with, up to a white space, is the prompt
    none          raw HH-RLHF        messages, split at the last assistant turn of each side
    text          an assistant turn  messages: the text becomes a user turn
    text or none  conversations      messages, split at the last assistant turn (also UltraFeedback's rows)
    messages      any of the three   messages

    Messages may be written as text, in JSON or as Python writes them. Tool calls, tool turns and reasoning of
    messages are kept for the chat template, and so are `tools` and `documents` (lists of mappings, or such as
    text) and `template_kwargs`.

    A single answer comes as both sides, with its label.

    Raises BadRowError. Source of the formats: TRL's "dataset formats". Unlike TRL, an implicit plain prompt
    ends before a word, not within one ("The sky is b" + "lue"), and a response is exactly one assistant turn.
    """
    prompt, chosen, rejected = (
        _parsed(*both) for both in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))
    )
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        _check_value(name, side)
    if prompt is not None:
        _check_value("prompt", prompt)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRowError("one side is text, the other messages")
    if prompt is None and isinstance(chosen, str) and chosen.startswith("\n\nHuman:"):
        chosen, rejected = _hh_messages("chosen", chosen), _hh_messages("rejected", rejected)
    if isinstance(chosen, str) and not isinstance(prompt, list):
        record = _plain_record(prompt, chosen, rejected, row)
    else:
        record = _messages_record(prompt, chosen, rejected, row)
    record = record if label is None else dataclasses.replace(record, label=label)
    _check_parts(record)
    if tools is None and documents is None and template_kwargs is None:
        return record
    return dataclasses.replace(
        record,
        tools=_json_value("tools", tools, list),
        documents=_documents(documents),
        template_kwargs=_json_value("chat_template_kwargs", template_kwargs, dict),
    )


def label_of(value: Any) -> bool:
    """Whether a single answer is a chosen one. Raises BadRowError where its label is neither true nor
    false."""
    known = {"true": True, "1": True, "false": False, "0": False}
    label = known.get(str(int(value) if isinstance(value, float) and value in (0, 1) else value).lower())
    if label is None:
        raise BadRowError(f"label is {shortened(repr(value))}; labels are true and false, or 1 and 0")
    return label


def _parsed(name: str, value: Any) -> Any:
    try:
        return parsed(value)
    except BadMessageError as error:
        raise BadRowError(f"{name} {error}") from None


def as_messages(record: PreferenceRecord, has_prompt: bool) -> PreferenceRecord:
    """A record of plain text as a user turn and two assistant turns; one of messages as it is. White space
    between prompt and response is the text's joint, which the template has its own for, and is left out.
    Raises BadRowError where the prompt is only what both sides begin with."""
    if not isinstance(record.prompt, str):
        return record
    if not has_prompt:
        raise BadRowError("data.as_chat=true needs a prompt of its own, and the sides only begin alike")
    turn = {"role": "user", "content": record.prompt.rstrip()}
    chosen, *between, rejected = (
        [{"role": "assistant", "content": str(side).lstrip()}] for side in record.responses
    )
    chat = dataclasses.replace(
        record, prompt=[turn], chosen=chosen, rejected=rejected, between=tuple(between)
    )
    _check_parts(chat)
    return chat


def _json_value(name: str, value: Any, kind: type) -> Any:
    """A list or an object of a column, or one as JSON or as Python writes it; None where there is none, or
    nothing in it."""
    if isinstance(value, str) and value.strip():
        spelt = spelled(value)
        if spelt is None and value.strip() not in ("null", "None"):
            raise BadRowError(f"{name} is text, and not JSON")
        value = spelt
    if not value:
        return None
    if not isinstance(value, kind):
        raise BadRowError(f"{name} is {type(value).__name__}, not a {'list' if kind is list else 'mapping'}")
    return value


def _documents(value: Any) -> list[Any] | None:
    documents: list[Any] | None = _json_value("documents", value, list)
    if not all(isinstance(document, dict) for document in documents or ()):
        raise BadRowError("documents has an entry that is no mapping")
    return documents


def _check_value(name: str, value: Any) -> None:
    if value is None:
        raise BadRowError(f"{name} is null")
    if isinstance(value, str):
        _check_text(name, value)
        return
    if not isinstance(value, list):
        raise BadRowError(f"{name} is {type(value).__name__}, neither text nor messages")
    if not value:
        raise BadRowError(f"{name} is empty")
    for message in value:
        has_content = isinstance(message, dict) and ("content" in message or message.get("tool_calls"))
        if not has_content or "role" not in message:
            raise BadRowError(f"{name} has a message without role and content")
        if message["role"] not in ROLES:
            role = shortened(repr(message["role"]))
            raise BadRowError(f"{name} has the role {role}; roles are {', '.join(ROLES)}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise BadRowError(f"{name} has a message whose content is not text")
        try:
            _check_text(name, content_text(message.get("content")))
        except BadMessageError as error:
            raise BadRowError(f"{name} {error}") from None


def _check_text(name: str, text: str) -> None:
    """JSON can spell half a character ("\\ud83d" alone), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"{name} has half a character (a lone surrogate)") from None


def _plain_record(prompt: str | None, chosen: str, rejected: str, row: int) -> PreferenceRecord:
    if prompt is None:
        cut = _common_beginning(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    return PreferenceRecord(prompt, chosen, rejected, row)


def _common_beginning(chosen: str, rejected: str) -> int:
    """Length of the common beginning, moved back to a white space, which stays with the responses."""
    if chosen == rejected:
        raise BadRowError("the sides are identical")
    shorter = min(len(chosen), len(rejected))
    cut = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while cut > 0 and not (chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace()):
        cut -= 1
    if not chosen[:cut].strip():
        raise BadRowError("there is no prompt, and no words that both sides begin with")
    return cut


def _messages_record(prompt: Any, chosen: Any, rejected: Any, row: int) -> PreferenceRecord:
    """Sides as one assistant turn each, after the prompt that they share."""
    if isinstance(chosen, str):
        chosen, rejected = ([{"role": "assistant", "content": side}] for side in (chosen, rejected))
    before_w, response_w = _split_conversation("chosen", chosen)
    before_l, response_l = _split_conversation("rejected", rejected)
    if before_w != before_l:
        raise BadRowError("the sides do not share one prompt before their last assistant turn")
    if isinstance(prompt, list):
        prompt = turns(prompt)
        if before_w and before_w != prompt:
            raise BadRowError("the prompt is not the beginning of the sides' conversation")
    elif before_w:
        if prompt is not None and not any(prompt.strip() in turn["content"] for turn in before_w):
            raise BadRowError("the prompt is not in the sides' conversation")
        prompt = before_w
    elif prompt is None:
        raise BadRowError("there is neither a prompt column nor a turn before the response")
    else:
        prompt = [{"role": "user", "content": prompt}]
    return PreferenceRecord(prompt, response_w, response_l, row)


def _split_conversation(name: str, side: list[dict[str, Any]]) -> tuple[Messages, Messages]:
    found = turns(side)
    if found[-1]["role"] != "assistant":
        raise BadRowError(f"{name} ends with a turn of the role {found[-1]['role']}, not assistant")
    return found[:-1], found[-1:]


def _hh_messages(name: str, text: str) -> Messages:
    """Turns of a raw HH-RLHF string. White space around a turn's text is the format's, not the speaker's."""
    first, *parts = _HH_TURN.split(text)
    if first.strip() or not parts:
        raise BadRowError(f'{name} does not begin with "\\n\\nHuman:" as the other side does')
    return [
        {"role": _HH_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _check_parts(record: PreferenceRecord) -> None:
    """Empty and identical parts, and prompts that no assistant turn can follow."""
    for name, side in (("chosen", record.chosen), ("rejected", record.rejected)):
        if not _text(side).strip():
            raise BadRowError(f"{name if record.label is None else 'completion'} is empty")
        if isinstance(side, list) and PLACE in side[0]["content"]:
            raise BadRowError(
                f"{name} has a message with a part of the type image; images stand in the prompt alone"
            )
    if record.chosen == record.rejected and record.label is None:
        raise BadRowError("the sides are identical")
    if not _text(record.prompt).strip():
        raise BadRowError("the prompt is empty")
    if isinstance(record.prompt, list):
        if record.prompt[-1]["role"] not in ("user", "tool"):
            raise BadRowError(
                f"the prompt ends with a turn of the role {record.prompt[-1]['role']}, not user"
            )
        if any(turn["role"] == "system" for turn in record.prompt[1:]):
            raise BadRowError("the prompt has a system turn that is not its first")


def _text(part: str | Messages) -> str:
    """All that is said; a turn that calls a tool says its call."""
    if isinstance(part, str):
        return part
    return "".join(
        turn["content"] + (json.dumps(turn["tool_calls"]) if "tool_calls" in turn else "") for turn in part
    )


MAX_TEXT = 600
"""Characters of one prompt or response in a page."""


def as_text(part: str | Messages) -> str:
    """Messages as ROLE: CONTENT; a single one as its content."""
    if isinstance(part, str):
        return part.strip()
    if len(part) == 1:
        text = part[0]["content"].strip()
    else:
        text = "\n".join(f"{message['role']}: {message['content'].strip()}" for message in part)
    return str(text).replace(PLACE, "[image] ")


def shortened_texts(record: PreferenceRecord) -> list[str]:
    """Prompt, chosen and rejected; a long prompt keeps its end, with the question, a long response its
    beginning."""
    prompt, *responses = map(as_text, (record.prompt, record.chosen, record.rejected))
    if record.label is not None:
        responses[int(record.label)] = "(a single answer)"
    if len(prompt) > MAX_TEXT:
        prompt = f"({len(prompt) - MAX_TEXT} characters before) … {prompt[-MAX_TEXT:]}"
    return [
        prompt,
        *(
            text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT} characters more)"
            for text in responses
        ),
    ]
